//! What every store has to do: the same list for the server in memory and for Ceph's.

use crate::client::{BUCKET, Client, put, status};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use mason_bucket::Rgw;

#[test]
fn server_in_memory_conforms() {
    let (server, client) = Client::of_server();
    conforms(&client);
    assert_eq!(server.store().keys(BUCKET), client_keys(&client, ""));
}

#[test]
fn rgw_conforms_and_keeps_objects_when_it_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut rgw) = Rgw::start(folder.path()) else { return };
    let client = Client::new(&rgw.endpoint(), rgw.access(), rgw.secret());
    client.wait(client.s3.create_bucket().bucket(BUCKET).send()).unwrap();
    conforms(&client);
    client.put("kept", b"before").unwrap();
    rgw.restart_radosgw();
    // The connections of the process that was killed are not used again.
    let client = Client::new(&rgw.endpoint(), rgw.access(), rgw.secret());
    assert_eq!(client.get("kept").unwrap(), b"before");
}

fn conforms(client: &Client) {
    keys_are_checked(client);
    objects(client);
    ranges(client);
    metadata_and_copies(client);
    conditions(client);
    listing(client);
    deleting(client);
    racing_for_keys(client);
    bucket_settings(client);
}

fn client_keys(client: &Client, prefix: &str) -> Vec<String> {
    let request = client.s3.list_objects_v2().bucket(BUCKET).prefix(prefix);
    let pages = client.wait(request.into_paginator().send().try_collect()).unwrap();
    pages.iter().flat_map(|page| page.contents()).map(|object| object.key().unwrap().to_owned()).collect()
}

fn keys_are_checked(client: &Client) {
    client.wait(client.s3.head_bucket().bucket(BUCKET).send()).unwrap();
    for (access, secret) in [("mason", "wrong"), ("nobody", "mason-secret")] {
        let stranger = Client::new(&client.endpoint, access, secret);
        assert_eq!(stranger.put("key", b"x"), Err(Some(403)));
    }
    let missing = client.s3.head_bucket().bucket("no-such-bucket").send();
    assert_eq!(client.wait(missing).map_err(|error| status(&error)).unwrap_err(), Some(404));
}

fn objects(client: &Client) {
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    for (key, bytes) in [("one", &b"1"[..]), ("a/b+c d%é", b"odd"), ("empty", b""), ("large", &large)] {
        let etag = client.put(key, bytes).unwrap();
        assert_eq!(client.get(key).unwrap(), bytes);
        let head = client.wait(client.s3.head_object().bucket(BUCKET).key(key).send()).unwrap();
        assert_eq!(head.content_length(), Some(bytes.len() as i64));
        assert_eq!(head.e_tag(), Some(etag.as_str()));
    }
    client.put("one", b"another").unwrap();
    assert_eq!(client.get("one").unwrap(), b"another");
    assert_eq!(client.get("none"), Err(Some(404)));
    let head = client.wait(client.s3.head_object().bucket(BUCKET).key("none").send());
    assert_eq!(status(&head.unwrap_err()), Some(404));
}

fn ranges(client: &Client) {
    client.put("digits", b"0123456789").unwrap();
    assert_eq!(client.get_range("digits", "2-4").unwrap(), b"234");
    assert_eq!(client.get_range("digits", "7-").unwrap(), b"789");
    assert_eq!(client.get_range("digits", "8-100").unwrap(), b"89");
    assert_eq!(client.get_range("digits", "-3").unwrap(), b"789");
    assert_eq!(client.get_range("digits", "10-12"), Err(Some(416)));
    let request = client.s3.get_object().bucket(BUCKET).key("digits").range("bytes=2-4");
    let answer = client.wait(request.send()).unwrap();
    assert_eq!(answer.content_range(), Some("bytes 2-4/10"));
}

fn metadata_and_copies(client: &Client) {
    let request = client.s3.put_object().bucket(BUCKET).key("original").metadata("epoch", "7");
    client.wait(request.body(b"data".to_vec().into()).send()).unwrap();
    let copy = client.s3.copy_object().bucket(BUCKET).key("copy");
    client.wait(copy.copy_source(format!("{BUCKET}/original")).send()).unwrap();
    assert_eq!(client.get("copy").unwrap(), b"data");
    for key in ["original", "copy"] {
        let head = client.wait(client.s3.head_object().bucket(BUCKET).key(key).send()).unwrap();
        assert_eq!(head.metadata().unwrap()["epoch"], "7");
    }
}

fn conditions(client: &Client) {
    let etag = client.put_if_absent("claim", b"first").unwrap();
    assert_eq!(client.put_if_absent("claim", b"second"), Err(Some(412)));
    assert_eq!(client.get("claim").unwrap(), b"first");
    // Without its quotes: Ceph takes no others.
    let replace = |etag: &str, bytes: &[u8]| {
        let request = client.s3.put_object().bucket(BUCKET).key("claim").if_match(etag);
        client.wait(request.body(bytes.to_vec().into()).send()).map_err(|error| status(&error))
    };
    replace(etag.trim_matches('"'), b"third").unwrap();
    assert_eq!(replace(etag.trim_matches('"'), b"fourth").unwrap_err(), Some(412));
    assert_eq!(client.get("claim").unwrap(), b"third");
    client.delete("claim").unwrap();
    client.put_if_absent("claim", b"again").unwrap();
}

fn listing(client: &Client) {
    let keys: Vec<_> = (0..7).map(|n| format!("list/{n}")).collect();
    keys.iter().for_each(|key| drop(client.put(key, key.as_bytes()).unwrap()));
    client.put("lisu", b"after the prefix").unwrap();
    assert_eq!(client_keys(client, "list/"), keys);
    assert_eq!(client_keys(client, "nothing"), [""; 0]);
    let list = || client.s3.list_objects_v2().bucket(BUCKET).prefix("list/");
    let after = client.wait(list().start_after("list/2").max_keys(2).send()).unwrap();
    let found: Vec<_> = after.contents().iter().map(|object| object.key().unwrap()).collect();
    assert_eq!(found, ["list/3", "list/4"]);
    assert_eq!(after.contents()[0].size(), Some(6));
    assert_eq!(after.is_truncated(), Some(true));
    let pages = client.wait(list().into_paginator().page_size(3).send().try_collect()).unwrap();
    assert_eq!(pages.iter().map(|page| page.contents().len()).collect::<Vec<_>>(), [3, 3, 1]);
    let last = client.wait(list().start_after("list/6").send()).unwrap();
    assert_eq!((last.contents().len(), last.is_truncated()), (0, Some(false)));
}

fn deleting(client: &Client) {
    let keys: Vec<_> = (0..5).map(|n| format!("gone/{n}")).collect();
    keys.iter().for_each(|key| drop(client.put(key, b"x").unwrap()));
    client.delete("gone/0").unwrap();
    client.delete("gone/0").unwrap();
    assert_eq!(client.get("gone/0"), Err(Some(404)));
    let objects =
        ["gone/1", "gone/2", "gone/none"].map(|key| ObjectIdentifier::builder().key(key).build().unwrap());
    let delete = Delete::builder().set_objects(Some(objects.to_vec())).build().unwrap();
    let answer = client.wait(client.s3.delete_objects().bucket(BUCKET).delete(delete).send()).unwrap();
    assert_eq!((answer.deleted().len(), answer.errors().len()), (3, 0));
    assert_eq!(client_keys(client, "gone/"), ["gone/3", "gone/4"]);
}

/// Exactly one of those that put a key if it is absent does.
fn racing_for_keys(client: &Client) {
    for n in 0..60 {
        let key = format!("race/{n}");
        let racers: Vec<_> = (0..4u8)
            .map(|racer| client.spawn(put(client.s3.clone(), key.clone(), vec![racer; 1000], true)))
            .collect();
        let outcomes: Vec<_> = racers.into_iter().map(|racer| client.wait(racer).unwrap()).collect();
        let winners: Vec<_> = (0..4u8).filter(|racer| outcomes[*racer as usize].is_ok()).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        // 409 is what S3 says to some of those that come at the same time.
        let refused = |outcome: &&Result<_, _>| matches!(outcome, Err(Some(412 | 409)));
        assert_eq!(outcomes.iter().filter(refused).count(), 3, "{outcomes:?}");
        assert_eq!(client.get(&key).unwrap(), vec![winners[0]; 1000]);
    }
}

fn bucket_settings(client: &Client) {
    let versioning = client.wait(client.s3.get_bucket_versioning().bucket(BUCKET).send()).unwrap();
    assert_eq!(versioning.status(), None);
    let lifecycle = client.s3.get_bucket_lifecycle_configuration().bucket(BUCKET).send();
    assert_eq!(client.wait(lifecycle).unwrap_err().code(), Some("NoSuchLifecycleConfiguration"));
    let lock = client.s3.get_object_lock_configuration().bucket(BUCKET).send();
    assert_eq!(status(&client.wait(lock).unwrap_err()), Some(404));
}
