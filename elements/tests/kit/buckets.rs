//! A volume in a server of these tests.

use blockmason_elements::cloud::tool::{self, Place};
use mason_bucket::Server;
use std::path::Path;

/// Makes the volume `vm1` in the bucket `vms` of a server, in objects of 4 KiB, and returns what a graph says of where it is.
pub(crate) fn volume(server: &Server, folder: impl AsRef<Path>, size: u64) -> String {
    server.store().create_bucket("vms");
    let keys = keys(folder.as_ref(), server.access(), server.secret());
    let endpoint = server.endpoint().to_owned();
    make(&endpoint, &keys, size);
    format!("(endpoint {endpoint}) (credentials {})", keys.display())
}

/// A file of keys.
pub(crate) fn keys(folder: &Path, access: &str, secret: &str) -> std::path::PathBuf {
    let path = folder.join("keys");
    let text = format!("[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n");
    std::fs::write(&path, text).unwrap();
    path
}

/// Makes the volume where the bucket is.
pub(crate) fn make(endpoint: &str, keys: &Path, size: u64) {
    let place = Place {
        bucket: "vms".to_owned(),
        prefix: "vm1".to_owned(),
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".to_owned(),
        credentials: Some(keys.to_owned()),
        ..Place::default()
    };
    tool::create(&place, size, 4096, true).unwrap();
}
