//! Amazon's client for tests that wait for each answer. It does not try again, and adds no checksums.

use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::primitives::ByteStream;
use std::future::Future;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// The bucket that tests use.
pub(crate) const BUCKET: &str = "disks";

/// The status of an answer that is an error; nothing where there was no answer.
pub(crate) type Status = Option<u16>;

pub(crate) struct Client {
    runtime: Runtime,
    pub(crate) endpoint: String,
    pub(crate) s3: aws_sdk_s3::Client,
}

impl Client {
    pub(crate) fn new(endpoint: &str, access: &str, secret: &str) -> Client {
        let keys = Credentials::builder().access_key_id(access).secret_access_key(secret);
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(endpoint)
            .region(Region::new("us-east-1"))
            .credentials_provider(keys.provider_name("tests").build())
            .force_path_style(true)
            .retry_config(RetryConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Client { runtime, endpoint: endpoint.to_owned(), s3: aws_sdk_s3::Client::from_conf(config) }
    }

    /// A server in memory with the bucket, and its client.
    pub(crate) fn of_server() -> (mason_bucket::Server, Client) {
        let server = mason_bucket::Server::new();
        server.store().create_bucket(BUCKET);
        let client = Client::new(&server.endpoint(), server.access(), server.secret());
        (server, client)
    }

    pub(crate) fn wait<T>(&self, answer: impl Future<Output = T>) -> T {
        self.runtime.block_on(answer)
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        answer: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.runtime.spawn(answer)
    }

    pub(crate) fn put(&self, key: &str, bytes: &[u8]) -> Result<String, Status> {
        self.wait(put(self.s3.clone(), key.to_owned(), bytes.to_vec(), false))
    }

    pub(crate) fn put_if_absent(&self, key: &str, bytes: &[u8]) -> Result<String, Status> {
        self.wait(put(self.s3.clone(), key.to_owned(), bytes.to_vec(), true))
    }

    pub(crate) fn get(&self, key: &str) -> Result<Vec<u8>, Status> {
        self.get_request(key, None)
    }

    pub(crate) fn get_range(&self, key: &str, range: &str) -> Result<Vec<u8>, Status> {
        self.get_request(key, Some(format!("bytes={range}")))
    }

    fn get_request(&self, key: &str, range: Option<String>) -> Result<Vec<u8>, Status> {
        self.wait(async {
            let request = self.s3.get_object().bucket(BUCKET).key(key).set_range(range);
            let answer = request.send().await.map_err(|error| status(&error))?;
            Ok(answer.body.collect().await.map_err(|_| None)?.to_vec())
        })
    }

    pub(crate) fn delete(&self, key: &str) -> Result<(), Status> {
        let request = self.s3.delete_object().bucket(BUCKET).key(key);
        self.wait(request.send()).map(drop).map_err(|error| status(&error))
    }
}

/// Answers with the ETag.
pub(crate) async fn put(
    s3: aws_sdk_s3::Client,
    key: String,
    bytes: Vec<u8>,
    if_absent: bool,
) -> Result<String, Status> {
    let condition = if_absent.then(|| "*".to_owned());
    let request = s3.put_object().bucket(BUCKET).key(key).body(ByteStream::from(bytes));
    let answer = request.set_if_none_match(condition).send().await.map_err(|error| status(&error))?;
    Ok(answer.e_tag.unwrap())
}

pub(crate) fn status<E>(error: &SdkError<E>) -> Status {
    error.raw_response().map(|answer| answer.status().as_u16())
}
