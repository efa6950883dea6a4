//! Where the keys of a bucket come from. They are never printed, and never in the text of a graph.

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_s3::error::BoxError;
use blockmason::{Error, Kind, Result};
use hyper::Request;
use hyper_util::rt::TokioIo;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// Where they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A file, in the form of `~/.aws/credentials`, and the profile in it.
    File { path: PathBuf, profile: String },
    /// What is found first: the environment, `~/.aws/credentials`, the role of the machine.
    Any,
}

/// The metadata service of virtual machines in a cloud.
const METADATA: &str = "http://169.254.169.254";

/// How long it may take: elsewhere nobody answers at that address.
const METADATA_TIME: Duration = Duration::from_secs(2);

impl Source {
    /// # Errors
    /// The file cannot be read, or lacks the profile.
    pub(crate) fn provider(self) -> Result<SharedCredentialsProvider> {
        if let Source::File { path, profile } = self {
            return read_file(&path, &profile).map(SharedCredentialsProvider::new);
        }
        if let Some(found) = environment() {
            return Ok(SharedCredentialsProvider::new(found));
        }
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".aws/credentials"));
        match home.filter(|path| path.exists()) {
            Some(path) => read_file(&path, &profile()).map(SharedCredentialsProvider::new),
            None => Ok(SharedCredentialsProvider::new(Instance::default())),
        }
    }
}

/// The profile that is meant where none is named.
pub(crate) fn profile() -> String {
    std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned())
}

fn environment() -> Option<Credentials> {
    let of = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let (id, secret) = (of("AWS_ACCESS_KEY_ID")?, of("AWS_SECRET_ACCESS_KEY")?);
    Some(Credentials::new(id, secret, of("AWS_SESSION_TOKEN"), None, "environment"))
}

/// # Errors
/// The file cannot be read, or lacks the profile. Its contents are in no message.
fn read_file(path: &Path, profile: &str) -> Result<Credentials> {
    let text = fs::read_to_string(path);
    let text = text.map_err(|error| Error::io(error, "the credentials cannot be read").with_path(path))?;
    let lacking = |what: &str| {
        Error::new(Kind::Denied, format!("its profile {profile:?} has no {what}")).with_path(path)
    };
    let mut inside = false;
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = name.trim() == profile || name.trim() == format!("profile {profile}");
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            match key.trim() {
                "aws_access_key_id" => id = Some(value.trim()),
                "aws_secret_access_key" => secret = Some(value.trim()),
                "aws_session_token" => token = Some(value.trim().to_owned()),
                _ => {}
            }
        }
    }
    let id = id.ok_or_else(|| lacking("aws_access_key_id"))?;
    let secret = secret.ok_or_else(|| lacking("aws_secret_access_key"))?;
    Ok(Credentials::new(id, secret, token, None, "file"))
}

/// The role of the machine. The client asks anew before what it got expires.
#[derive(Debug, Default)]
struct Instance {
    /// It had keys: that none can be had now does not mean that there are none.
    had: AtomicBool,
}

impl Instance {
    fn told(&self, answer: Answer<Credentials>) -> std::result::Result<Credentials, CredentialsError> {
        match answer {
            Ok(found) => {
                self.had.store(true, Ordering::Relaxed);
                Ok(found)
            }
            Err(error) if self.had.load(Ordering::Relaxed) => Err(CredentialsError::provider_error(error)),
            Err(error) => Err(CredentialsError::not_loaded(error)),
        }
    }
}

impl ProvideCredentials for Instance {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async move {
            let asked = blockmason::rt::timeout(METADATA_TIME, ask()).await;
            let late = || Err("no metadata service answers".into());
            self.told(asked.unwrap_or_else(late))
        })
    }
}

type Answer<T> = std::result::Result<T, BoxError>;

async fn ask() -> Answer<Credentials> {
    let base = std::env::var("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|_| METADATA.to_owned());
    let lives = ("x-aws-ec2-metadata-token-ttl-seconds", "21600");
    let token = call(&base, "PUT", "/latest/api/token", lives).await?;
    let token = ("x-aws-ec2-metadata-token", token.as_str());
    let roles = "/latest/meta-data/iam/security-credentials/";
    let role = call(&base, "GET", roles, token).await?;
    let role = role.lines().next().ok_or("the machine has no role")?.to_owned();
    let text = call(&base, "GET", &format!("{roles}{role}"), token).await?;
    let found: serde_json::Value = serde_json::from_str(&text)?;
    let of = |name: &str| found[name].as_str().map(str::to_owned).ok_or("the role has no keys");
    let expires = of("Expiration").ok().and_then(|time| expiry(&time));
    Ok(Credentials::new(of("AccessKeyId")?, of("SecretAccessKey")?, of("Token").ok(), expires, "instance"))
}

fn expiry(time: &str) -> Option<SystemTime> {
    use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
    SystemTime::try_from(DateTime::from_str(time, DateTimeFormat::DateTime).ok()?).ok()
}

/// One request, whose answer is a short text.
async fn call(base: &str, method: &str, path: &str, header: (&str, &str)) -> Answer<String> {
    const MOST: usize = 1 << 16;
    let uri: hyper::Uri = format!("{base}{path}").parse()?;
    let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(80));
    let stream = tokio::net::TcpStream::connect((host, port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let sent = async {
        let request =
            Request::builder().method(method).uri(path).header("host", host).header(header.0, header.1);
        let response = sender.send_request(request.body(String::new())?).await?;
        if !response.status().is_success() {
            return Err(BoxError::from(format!("the metadata service says {}", response.status())));
        }
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        loop {
            let frame = std::future::poll_fn(|task| {
                hyper::body::Body::poll_frame(std::pin::Pin::new(&mut body), task)
            });
            let Some(frame) = frame.await else { break };
            if let Ok(data) = frame?.into_data() {
                bytes.extend(data);
            }
            if bytes.len() > MOST {
                return Err("the metadata service does not stop".into());
            }
        }
        Ok(String::from_utf8(bytes)?)
    };
    tokio::select! {
        sent = sent => sent,
        ended = connection => Err(ended.err().map_or("the metadata service hangs up".into(), Into::into)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_its_secrets_are_in_no_message() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        let text = "[default]\naws_access_key_id = AAA\n[vm]\naws_access_key_id=ID\naws_secret_access_key = SEC=RET\n";
        fs::write(&path, text).unwrap();
        let found = read_file(&path, "vm").unwrap();
        assert_eq!((found.access_key_id(), found.secret_access_key()), ("ID", "SEC=RET"));
        assert!(!format!("{found:?}").contains("RET"));
        let error = read_file(&path, "default").unwrap_err().to_string();
        assert!(error.contains("no aws_secret_access_key") && !error.contains("AAA"), "{error}");
        let error = read_file(&folder.path().join("none"), "vm").unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn a_role_that_had_keys_still_has_them() {
        let (instance, silent) = (Instance::default(), || Err("nobody answers".into()));
        assert!(matches!(instance.told(silent()), Err(CredentialsError::CredentialsNotLoaded(_))));
        assert!(instance.told(Ok(Credentials::new("id", "secret", None, None, "instance"))).is_ok());
        assert!(matches!(instance.told(silent()), Err(CredentialsError::ProviderError(_))));
    }
}
