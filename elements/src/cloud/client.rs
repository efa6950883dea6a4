//! The client of S3 and of what speaks like it. One call is one request: what tries again is store.rs.

use super::credentials::Source;
use super::format::LARGEST;
use super::store::{Attempt, Failure, Head, Listed, ObjectStore, Put};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Intercept, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    RuntimeComponents, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use aws_smithy_http_client::tls::{self, TlsContext, TrustStore};
use blockmason::data::{Data, PoolBuf};
use blockmason::element::BoxFuture;
use blockmason::{Error, Kind, Result};
use http_body_util::Limited;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

/// Where a bucket is.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) bucket: String,
    /// None for the one of Amazon.
    pub(crate) endpoint: Option<String>,
    pub(crate) region: String,
    /// The bucket is part of the path, not of the host's name.
    pub(crate) by_path: bool,
    pub(crate) credentials: Source,
    /// Certificates to trust beside those of the system, as PEM.
    pub(crate) ca: Option<Vec<u8>>,
}

/// A bucket of a server.
pub(crate) struct S3 {
    client: aws_sdk_s3::Client,
    bucket: String,
    /// Bodies go over TLS, which sees to it that they arrive as they are: they need not be hashed as well.
    tls: bool,
}

/// The key of the put's id in an object's metadata.
const PUT_ID: &str = "put-id";

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

impl S3 {
    /// # Errors
    /// The credentials or certificates that are named cannot be read. Connects to nothing.
    pub(crate) fn new(target: &Target) -> Result<S3> {
        let tls = target.endpoint.as_ref().is_none_or(|endpoint| endpoint.starts_with("https:"));
        let mut config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(target.region.clone()))
            .credentials_provider(target.credentials.clone().provider()?)
            .http_client(http_client(target.ca.as_deref())?)
            .interceptor(Bounded)
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT).build())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .force_path_style(target.by_path);
        if let Some(endpoint) = &target.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Ok(S3 { client: aws_sdk_s3::Client::from_conf(config.build()), bucket: target.bucket.clone(), tls })
    }
}

fn http_client(ca: Option<&[u8]>) -> Result<SharedHttpClient> {
    let mut trust = TrustStore::default();
    if let Some(ca) = ca {
        trust.add_pem_certificate(ca);
    }
    let context = TlsContext::builder().with_trust_store(trust).build();
    let context =
        context.map_err(|error| Error::invalid("the certificates cannot be used").with_source(error))?;
    let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc);
    Ok(aws_smithy_http_client::Builder::new().tls_provider(provider).tls_context(context).build_https())
}

/// No answer is longer than the longest object: a server that sends without end is broken off, and what it has sent until
/// then is all the memory that it gets.
#[derive(Debug)]
struct Bounded;

impl Intercept for Bounded {
    fn name(&self) -> &'static str {
        "Bounded"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _runtime: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        let whole = std::mem::replace(body, SdkBody::taken());
        *body = SdkBody::from_body_1_x(Limited::new(whole, LARGEST as usize));
        Ok(())
    }
}

/// Certificates of a file.
pub(crate) fn read_ca(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(error, "the certificates cannot be read").with_path(path))
}

/// What a server's refusal means.
enum Refusal {
    NotThere,
    Exists,
    Failed(Failure),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        match refusal {
            Refusal::Failed(failure) => failure,
            Refusal::NotThere => Failure::Never(Error::new(Kind::Unavailable, "it is not there")),
            Refusal::Exists => Failure::Never(Error::new(Kind::Busy, "it is there already")),
        }
    }
}

fn refusal<E>(error: &SdkError<E>) -> Refusal
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let again = |why: String| Refusal::Failed(Failure::Again(why));
    let never = |kind, why: String| Refusal::Failed(Failure::Never(Error::new(kind, why)));
    let Some(service) = error.as_service_error() else {
        return match error {
            SdkError::ConstructionFailure(_) => never(Kind::Invalid, cause(error)),
            _ => match lack_of_credentials(error) {
                Some(why) => never(Kind::Denied, why),
                None => again(cause(error)),
            },
        };
    };
    let status = status(error);
    let code = service.code().unwrap_or_default();
    let said = match (code, service.message()) {
        ("", _) => format!("the server says {status}"),
        (code, Some(message)) => format!("the server says {code}: {message}"),
        (code, None) => format!("the server says {code}"),
    };
    match (status, code) {
        (_, "NoSuchBucket") => {
            let why = "there is no such bucket; `mason bucket create --make-bucket` makes it with the disk";
            never(Kind::Unavailable, why.to_owned())
        }
        (_, "SignatureDoesNotMatch") => {
            never(Kind::Denied, format!("{said}: is it the secret of this access key?"))
        }
        (404, _) => Refusal::NotThere,
        (412, _) => Refusal::Exists,
        // Two puts of one key at the same time: neither says whether there is an object.
        (409, _) | (408 | 425 | 429, _) | (500.., _) => again(said),
        (_, "RequestTimeTooSkewed") => {
            never(Kind::Denied, "this machine's clock and the server's differ too much".to_owned())
        }
        (_, "ExpiredToken" | "RequestTimeout" | "SlowDown") => again(said),
        (_, "QuotaExceeded") => never(Kind::NoSpace, said),
        (301 | 307, _) | (_, "AuthorizationHeaderMalformed" | "PermanentRedirect") => {
            let region =
                error.raw_response().and_then(|response| response.headers().get("x-amz-bucket-region"));
            let region = region.map(|region| format!(": it is in {region}")).unwrap_or_default();
            never(Kind::Invalid, format!("the bucket is in another region{region}"))
        }
        (401 | 403, _) => never(Kind::Denied, said),
        (400, _) => never(Kind::Invalid, said),
        _ => never(Kind::Io, said),
    }
}

/// The HTTP status of the answer; 0 without one.
fn status<E>(error: &SdkError<E>) -> u16 {
    error.raw_response().map_or(0, |response| response.status().as_u16())
}

/// Why there are none, if that is so: then nothing was sent. That they cannot be had just now is another thing.
fn lack_of_credentials(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let lacking = chain.filter_map(|error| error.downcast_ref::<CredentialsError>());
    let lacking =
        lacking.filter(|error| matches!(error, CredentialsError::CredentialsNotLoaded(_))).last()?;
    let nowhere =
        "there are no credentials in the environment or in ~/.aws/credentials, and the machine has no role";
    Some(format!("{nowhere}: {}", cause(lacking)))
}

/// What is at the bottom of an error: all above it is about the library.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let last = std::iter::successors(Some(error), |error| error.source()).last();
    last.map_or_else(String::new, ToString::to_string).chars().take(200).collect()
}

/// Bytes that a body shares.
struct Flat(Data);

impl AsRef<[u8]> for Flat {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice().unwrap_or_default()
    }
}

fn body(data: &Data) -> ByteStream {
    ByteStream::from(bytes::Bytes::from_owner(Flat(data.flatten())))
}

/// Reads a body of at most `most` bytes.
async fn collect(mut from: ByteStream, promised: Option<i64>, most: u64) -> Attempt<Data> {
    let promised = promised.and_then(|len| u64::try_from(len).ok());
    let len =
        promised.ok_or_else(|| Failure::Again("the server does not say how much it sends".to_owned()))?;
    if len > most {
        return Err(Failure::Again(format!("the server sends {len} bytes where {most} were asked for")));
    }
    let mut buf = PoolBuf::new(len as usize);
    let mut at = 0;
    while let Some(chunk) = from.next().await {
        let chunk = chunk.map_err(|error| Failure::Again(format!("the answer breaks off: {error}")))?;
        let Some(to) = buf.get_mut(at..at + chunk.len()) else {
            return Err(Failure::Again("the server sends more than it said".to_owned()));
        };
        to.copy_from_slice(&chunk);
        at += chunk.len();
    }
    if at as u64 != len {
        return Err(Failure::Again(format!("the answer breaks off after {at} of {len} bytes")));
    }
    Ok(buf.freeze())
}

impl ObjectStore for S3 {
    fn put<'a>(&'a self, key: &'a str, data: Data, id: &'a str, absent: bool) -> BoxFuture<'a, Attempt<Put>> {
        Box::pin(async move {
            let put = self.client.put_object().bucket(&self.bucket).key(key).body(body(&data));
            let put = put.metadata(PUT_ID, id).set_if_none_match(absent.then(|| "*".to_owned()));
            let put = put.customize();
            let sent = if self.tls { put.disable_payload_signing().send().await } else { put.send().await };
            match sent.as_ref().map_err(refusal) {
                Ok(_) => Ok(Put::Done),
                Err(Refusal::Exists) if absent => Ok(Put::Exists),
                Err(refusal) => Err(refusal.into()),
            }
        })
    }

    fn get_range<'a>(&'a self, key: &'a str, range: Range<u64>) -> BoxFuture<'a, Attempt<Option<Data>>> {
        Box::pin(async move {
            let get = self.client.get_object().bucket(&self.bucket).key(key);
            let sent = get.range(format!("bytes={}-{}", range.start, range.end - 1)).send().await;
            match sent {
                Ok(got) => collect(got.body, got.content_length, range.end - range.start).await.map(Some),
                // It ends before the range begins.
                Err(error) if status(&error) == 416 => Ok(Some(Data::empty())),
                Err(error) => match refusal(&error) {
                    Refusal::NotThere => Ok(None),
                    refusal => Err(refusal.into()),
                },
            }
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Attempt<Option<Head>>> {
        Box::pin(async move {
            match self.client.head_object().bucket(&self.bucket).key(key).send().await {
                Ok(head) => Ok(Some(Head {
                    len: head.content_length.and_then(|len| u64::try_from(len).ok()).unwrap_or(0),
                    put_id: head.metadata.and_then(|mut metadata| metadata.remove(PUT_ID)),
                })),
                Err(error) => match refusal(&error) {
                    Refusal::NotThere => Ok(None),
                    refusal => Err(refusal.into()),
                },
            }
        })
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Attempt<()>> {
        Box::pin(async move {
            let named = keys.iter().map(|key| ObjectIdentifier::builder().key(key).build());
            let named = named.collect::<std::result::Result<Vec<_>, _>>();
            let delete =
                named.and_then(|named| Delete::builder().set_objects(Some(named)).quiet(true).build());
            let delete = delete.map_err(|error| Failure::Never(Error::internal(error.to_string())))?;
            let sent = self.client.delete_objects().bucket(&self.bucket).delete(delete).send().await;
            let deleted = sent.map_err(|error| Failure::from(refusal(&error)))?;
            let failed = deleted.errors().iter().find(|error| error.code() != Some("NoSuchKey"));
            match failed {
                None => Ok(()),
                Some(error) => {
                    let (code, key) = (error.code().unwrap_or("?"), error.key().unwrap_or("?"));
                    let why = format!("the server says {code} of {key}");
                    Err(match code {
                        "AccessDenied" => Failure::Never(Error::new(Kind::Denied, why)),
                        _ => Failure::Again(why),
                    })
                }
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, most: u32) -> BoxFuture<'a, Attempt<Vec<Listed>>> {
        Box::pin(async move {
            let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
            let list = list.max_keys(most.min(1000) as i32);
            let list = list.set_start_after((!after.is_empty()).then(|| after.to_owned()));
            let listed = list.send().await.map_err(|error| Failure::from(refusal(&error)))?;
            let lines = listed.contents.unwrap_or_default().into_iter().map(|object| Listed {
                key: object.key.unwrap_or_default(),
                len: object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
            });
            Ok(lines.collect())
        })
    }

    fn dangers(&self) -> BoxFuture<'_, Attempt<Vec<String>>> {
        Box::pin(async move {
            let mut found = Vec::new();
            found.extend(self.versioning().await?);
            found.extend(self.lifecycle().await?);
            found.extend(self.object_lock().await?);
            found.extend(self.public_access().await?);
            Ok(found)
        })
    }
}

/// An answer about settings: servers that have no such setting say so in many ways.
fn setting<T, E>(
    sent: std::result::Result<T, SdkError<E>>,
    what: &str,
) -> Attempt<std::result::Result<T, Option<String>>>
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let error = match sent {
        Ok(found) => return Ok(Ok(found)),
        Err(error) => error,
    };
    match refusal(&error) {
        Refusal::Failed(Failure::Never(error)) if error.kind() == Kind::Denied => {
            Ok(Err(Some(format!("these credentials may not ask for {what}: look yourself"))))
        }
        Refusal::Failed(Failure::Again(why)) if status(&error) != 501 => Err(Failure::Again(why)),
        _ => Ok(Err(None)),
    }
}

impl S3 {
    /// Makes the bucket. One attempt.
    pub(crate) async fn make_bucket(&self) -> Result<()> {
        let Err(error) = self.client.create_bucket().bucket(&self.bucket).send().await else { return Ok(()) };
        if error.as_service_error().is_some_and(|error| error.is_bucket_already_owned_by_you()) {
            return Ok(());
        }
        let failed = |failure| match failure {
            Failure::Never(error) => error,
            Failure::Again(why) => Error::new(Kind::Unavailable, why),
        };
        Err(failed(refusal(&error).into()).with_path(&self.bucket))
    }

    async fn versioning(&self) -> Attempt<Option<String>> {
        let sent = self.client.get_bucket_versioning().bucket(&self.bucket).send().await;
        Ok(match setting(sent, "versioning")? {
            Ok(found) if found.status().is_some_and(|status| status.as_str() == "Enabled") => Some(
                "versioning is enabled: what is deleted stays, and is paid for, until a lifecycle rule ends old versions"
                    .to_owned(),
            ),
            Ok(_) => None,
            Err(said) => said,
        })
    }

    async fn lifecycle(&self) -> Attempt<Vec<String>> {
        let sent = self.client.get_bucket_lifecycle_configuration().bucket(&self.bucket).send().await;
        let rules = match setting(sent, "lifecycle rules")? {
            Ok(found) => found.rules.unwrap_or_default(),
            Err(said) => return Ok(said.into_iter().collect()),
        };
        let mut found = Vec::new();
        for rule in rules.iter().filter(|rule| rule.status().as_str() == "Enabled") {
            let id = rule.id().unwrap_or("without a name");
            if rule.expiration().is_some() {
                found.push(format!("lifecycle rule {id} deletes objects after a time: it destroys the disk"));
            }
            if !rule.transitions().is_empty() {
                found.push(format!(
                    "lifecycle rule {id} moves objects to another tier: reads of an archive fail"
                ));
            }
        }
        Ok(found)
    }

    async fn object_lock(&self) -> Attempt<Option<String>> {
        let sent = self.client.get_object_lock_configuration().bucket(&self.bucket).send().await;
        Ok(match setting(sent, "object lock")? {
            Ok(found) if found.object_lock_configuration().is_some_and(|lock| lock.rule().is_some()) => Some(
                "object lock is on by default: nothing can be deleted, and all of it is paid for".to_owned(),
            ),
            Ok(_) => None,
            Err(said) => said,
        })
    }

    async fn public_access(&self) -> Attempt<Option<String>> {
        let sent = self.client.get_bucket_policy_status().bucket(&self.bucket).send().await;
        Ok(match setting(sent, "the policy")? {
            Ok(found) if found.policy_status().and_then(|status| status.is_public()) == Some(true) => {
                Some("the bucket's policy is public: anybody may read the disk".to_owned())
            }
            Ok(_) => None,
            Err(said) => said,
        })
    }
}
