//! The objects, in memory. Tests look into them and spoil them.

use hyper::body::Bytes;
use s3s::crypto::{Checksum, Md5};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

/// One object.
#[derive(Clone, Debug)]
pub struct Object {
    /// Its contents.
    pub bytes: Bytes,
    /// Without quotes: the MD5 of the contents it was put with, in hexadecimal.
    pub etag: String,
    /// `x-amz-meta-*`, without that prefix.
    pub metadata: HashMap<String, String>,
    /// When it was put.
    pub modified: SystemTime,
}

impl Object {
    pub(crate) fn new(bytes: Bytes, metadata: HashMap<String, String>) -> Object {
        let mut etag = String::new();
        for byte in Md5::checksum(&bytes) {
            write!(etag, "{byte:02x}").unwrap();
        }
        Object { bytes, etag, metadata, modified: now() }
    }
}

#[allow(clippy::disallowed_methods, reason = "clients compare it with their own clock")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// What the buckets say of themselves, for tests of what is warned of. The default is nothing to warn of.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `Enabled` or `Suspended`; else versioning was never on.
    pub versioning: Option<&'static str>,
    /// Objects are deleted by a rule after these days.
    pub expire_after_days: Option<i32>,
    /// Objects cannot be deleted.
    pub object_lock: bool,
    /// Public access is not blocked.
    pub public: bool,
}

#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) buckets: BTreeMap<String, BTreeMap<String, Object>>,
    pub(crate) settings: Settings,
}

/// The buckets of a server. Clones are the same store.
#[derive(Clone, Default)]
pub struct Store(Arc<Mutex<Inner>>);

impl Store {
    /// One lock for everything: what a request decides and what it then does are one step.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// Makes a bucket; one that exists stays as it is.
    pub fn create_bucket(&self, bucket: &str) {
        self.lock().buckets.entry(bucket.to_owned()).or_default();
    }

    /// The keys of a bucket, in order.
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        self.lock().buckets.get(bucket).map_or_else(Vec::new, |keys| keys.keys().cloned().collect())
    }

    /// An object.
    pub fn get(&self, bucket: &str, key: &str) -> Option<Object> {
        self.lock().buckets.get(bucket)?.get(key).cloned()
    }

    /// Puts an object, also where there is one.
    pub fn put(&self, bucket: &str, key: &str, bytes: impl Into<Bytes>) {
        let object = Object::new(bytes.into(), HashMap::new());
        self.lock().buckets.get_mut(bucket).unwrap().insert(key.to_owned(), object);
    }

    /// Changes the contents of an object behind everybody's back: its ETag stays.
    pub fn corrupt(&self, bucket: &str, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut inner = self.lock();
        let object = inner.buckets.get_mut(bucket).unwrap().get_mut(key).unwrap();
        let mut bytes = object.bytes.to_vec();
        change(&mut bytes);
        object.bytes = bytes.into();
    }

    /// Deletes an object. True if there was one.
    pub fn delete(&self, bucket: &str, key: &str) -> bool {
        self.lock().buckets.get_mut(bucket).is_some_and(|keys| keys.remove(key).is_some())
    }

    /// What the buckets say of themselves from now on.
    pub fn set(&self, settings: Settings) {
        self.lock().settings = settings;
    }
}
