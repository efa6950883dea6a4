//! The program, as tests that are not in Rust use it.

use crate::client::{BUCKET, Client};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[test]
fn it_says_where_it_is_and_ends_with_its_input() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mason-bucket"));
    command.args(["--access", "me", "--secret", "mine", "--bucket", BUCKET]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&said["access"], &said["secret"]), (&"me".into(), &"mine".into()));
    let client = Client::new(said["endpoint"].as_str().unwrap(), "me", "mine");
    client.put("key", b"x").unwrap();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(client.get("key"), Err(None));
}
