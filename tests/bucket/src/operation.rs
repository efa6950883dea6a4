//! What a request asks for, read off its first line: faults are chosen by it before S3 has looked at the request.

use hyper::Method;
use hyper::http::request::Parts;

/// An operation of S3, as rules and the log name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// CreateBucket.
    CreateBucket,
    /// HeadBucket.
    HeadBucket,
    /// PutObject.
    Put,
    /// GetObject.
    Get,
    /// HeadObject.
    Head,
    /// DeleteObject.
    Delete,
    /// DeleteObjects; its key is empty, for the keys are in its body.
    DeleteMany,
    /// ListObjectsV2; its key is the prefix that is asked for.
    List,
    /// CopyObject; its key is the new one.
    Copy,
    /// GetBucketVersioning.
    Versioning,
    /// GetBucketLifecycleConfiguration.
    Lifecycle,
    /// GetObjectLockConfiguration.
    ObjectLock,
    /// GetPublicAccessBlock.
    PublicAccess,
    /// Whatever else.
    Other,
}

impl Operation {
    /// The operation of a request in path style, and its key.
    pub(crate) fn of(request: &Parts) -> (Operation, String) {
        let path = request.uri.path().trim_start_matches('/');
        let key = decoded(path.split_once('/').map_or("", |(_, key)| key));
        let query = request.uri.query().unwrap_or_default();
        let asks = |name: &str| query.split('&').any(|part| part.split('=').next() == Some(name));
        let copies = request.headers.contains_key("x-amz-copy-source");
        let operation = match (&request.method, key.is_empty()) {
            (&Method::PUT, false) if copies => Operation::Copy,
            (&Method::PUT, false) => Operation::Put,
            (&Method::GET, false) => Operation::Get,
            (&Method::HEAD, false) => Operation::Head,
            (&Method::DELETE, false) => Operation::Delete,
            (&Method::PUT, true) if query.is_empty() => Operation::CreateBucket,
            (&Method::HEAD, true) => Operation::HeadBucket,
            (&Method::POST, true) if asks("delete") => Operation::DeleteMany,
            (&Method::GET, true) if asks("list-type") => Operation::List,
            (&Method::GET, true) if asks("versioning") => Operation::Versioning,
            (&Method::GET, true) if asks("lifecycle") => Operation::Lifecycle,
            (&Method::GET, true) if asks("object-lock") => Operation::ObjectLock,
            (&Method::GET, true) if asks("publicAccessBlock") => Operation::PublicAccess,
            _ => Operation::Other,
        };
        let prefix = || query.split('&').find_map(|part| part.strip_prefix("prefix=")).map(decoded);
        let key = if operation == Operation::List { prefix().unwrap_or_default() } else { key };
        (operation, key)
    }
}

fn decoded(text: &str) -> String {
    urlencoding::decode(text).map_or_else(|_| text.to_owned(), |text| text.into_owned())
}
