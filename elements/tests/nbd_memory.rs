//! A client cannot make the NBD handshake take memory by announcing it.
//!
//! A test binary of its own, since it looks at the peak memory of its process.

use blockmason_elements::nbd::server::{Export, Exports, Listed, MAX_DRAIN, TlsPolicy, negotiate};
use blockmason_elements::nbd::wire::{OptionCode, OptionHeader, encode_option};
use std::io::Cursor;
use tokio::io::AsyncReadExt;

struct Nothing;

impl Exports for Nothing {
    type Handle = ();

    fn list(&self) -> Vec<Listed> {
        Vec::new()
    }

    fn find(&self, _: &str) -> Option<Export<()>> {
        None
    }
}

/// The most memory that this process ever had in use, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a /proc file system");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

#[test]
fn announced_lengths_take_no_memory() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let before = peak_kib();
    for len in [0xffff, 1 << 16, (1 << 16) + 1, 1 << 20, 32 << 20, (32 << 20) + 1, u32::MAX] {
        for option in (0..14).chain([u32::MAX]) {
            // One option of as many bytes as it announces, then zeroes, which are no option.
            let header = encode_option(&OptionHeader { option: OptionCode(option), len });
            let start = [&3_u32.to_be_bytes()[..], &header].concat();
            let client = Cursor::new(start).chain(tokio::io::repeat(0).take(u64::from(len) + 16));
            let stream = tokio::io::join(client, tokio::io::sink());
            let outcome = runtime.block_on(negotiate(stream, &Nothing, &TlsPolicy::Off));
            match outcome {
                Ok(left) => assert!(left.is_none() && option == OptionCode::ABORT.0),
                Err(_) if option == OptionCode::EXPORT_NAME.0 => {}
                Err(error) if len > MAX_DRAIN => assert!(error.to_string().contains("absurdly long")),
                // The option was taken off the stream to its last byte: next come the zeroes.
                Err(error) => assert_eq!(error.to_string(), "bad NBD magic number 0x0", "{option} {len}"),
            }
        }
    }
    let grown = peak_kib() - before;
    assert!(grown < 4096, "the handshake took {grown} KiB");
}
