//! Secrets: where they come from, and how one wraps another. None of them is ever printed.

use super::format::{Cipher, Cost, DataKey, Id, Opener, SLOTS, Slot};
use aws_lc_rs::aead::{AES_256_GCM, AES_256_GCM_SIV, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, hmac, rand};
use blockmason::{Error, Kind, Result, rt};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use zeroize::Zeroizing;

/// Bytes of a master key, a data key and a wrapping key.
pub(super) const KEY: usize = 32;

/// The longest secret that is read, in bytes.
const LONGEST: usize = 64 << 10;

/// The shortest passphrase, in bytes. What is shorter, everybody can try.
const SHORTEST_PASSPHRASE: usize = 8;

/// How long a command may take to print a key.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a passphrase costs that is added now: the second choice of RFC 9106, a tenth of a second or two.
const COST: Cost = match cfg!(test) {
    // Slots say what theirs cost, so that tests need not wait.
    true => Cost { memory: 64, passes: 1, lanes: 1 },
    false => Cost { memory: 64 << 10, passes: 3, lanes: 4 },
};

/// Bytes that nobody else is to see. Overwritten when they are dropped.
pub(super) struct Secret(Zeroizing<Vec<u8>>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a secret")
    }
}

fn failed(what: &str) -> Error {
    Error::internal(format!("the cryptographic library refused to {what}"))
}

/// Random bytes of the system's generator: not of the one that a test can repeat, for what they are needed for
/// must never come twice.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| failed("give random bytes"))?;
    Ok(bytes)
}

impl Secret {
    /// A new key.
    pub(super) fn draw() -> Result<Secret> {
        let mut key = Zeroizing::new(vec![0; KEY]);
        rand::fill(&mut key).map_err(|_| failed("give random bytes"))?;
        Ok(Secret(key))
    }

    /// The same once more, for a thread that wraps it.
    pub(super) fn duplicate(&self) -> Secret {
        Secret(self.0.clone())
    }

    /// Another key that follows from this one.
    pub(super) fn derive(&self, salt: &[u8], info: &[&[u8]]) -> Result<Secret> {
        let mut key = Zeroizing::new(vec![0; KEY]);
        let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(&self.0);
        let expanded = extracted.expand(info, hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut key));
        expanded.map_err(|_| failed("derive a key"))?;
        Ok(Secret(key))
    }

    fn stretch(&self, salt: &[u8], cost: Cost) -> Result<Secret> {
        let refused = |error| Error::invalid(format!("the passphrase cannot be tried: {error}"));
        let params = argon2::Params::new(cost.memory, cost.passes, cost.lanes, Some(KEY)).map_err(refused)?;
        let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let mut key = Zeroizing::new(vec![0; KEY]);
        argon2.hash_password_into(&self.0, salt, &mut key).map_err(refused)?;
        Ok(Secret(key))
    }

    /// The key for a cipher.
    pub(super) fn cipher(&self, cipher: Cipher) -> Result<LessSafeKey> {
        let algorithm = match cipher {
            Cipher::Gcm => &AES_256_GCM,
            Cipher::GcmSiv => &AES_256_GCM_SIV,
        };
        UnboundKey::new(algorithm, &self.0).map(LessSafeKey::new).map_err(|_| failed("take a key"))
    }

    pub(super) fn sign(&self, bytes: &[u8]) -> [u8; 32] {
        let mut sum = [0; 32];
        sum.copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), bytes).as_ref());
        sum
    }

    pub(super) fn verifies(&self, bytes: &[u8], sum: &[u8]) -> bool {
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), bytes, sum).is_ok()
    }

    /// Another key, to be kept where others see it.
    fn wrap(&self, key: &Secret, context: &[u8]) -> Result<Wrapped> {
        let nonce: [u8; 12] = random()?;
        let mut bytes = [0; KEY + 16];
        let (sealed, tag) = bytes.split_at_mut(KEY);
        let outcome = self.cipher(Cipher::Gcm)?.seal_out_of_place_scatter(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(context),
            &key.0,
            sealed,
            &[],
            tag,
        );
        outcome.map_err(|_| failed("wrap a key"))?;
        Ok(Wrapped { nonce, bytes })
    }

    /// The key that was wrapped; None if it was not wrapped by this one, or is damaged.
    fn unwrap(&self, wrapped: &Wrapped, context: &[u8]) -> Option<Secret> {
        let mut key = Zeroizing::new(vec![0; KEY]);
        let (sealed, tag) = wrapped.bytes.split_at(KEY);
        let nonce = Nonce::assume_unique_for_key(wrapped.nonce);
        let cipher = self.cipher(Cipher::Gcm).ok()?;
        cipher.open_separate_gather(nonce, Aad::from(context), sealed, tag, &mut key).ok()?;
        Some(Secret(key))
    }
}

/// A key that another one has wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrapped {
    pub(super) nonce: [u8; 12],
    /// With the tag.
    pub(super) bytes: [u8; KEY + 16],
}

fn bound(id: &Id, numbers: &[u32]) -> Vec<u8> {
    id.iter().copied().chain(numbers.iter().flat_map(|number| number.to_le_bytes())).collect()
}

/// What opens key slots, and of which kind it is.
#[derive(Debug)]
pub(super) struct Credential {
    secret: Secret,
    opener: Opener,
}

impl Credential {
    fn key(&self, id: &Id, salt: &[u8; 32], opener: Opener) -> Result<Secret> {
        debug_assert_eq!(opener.kind(), self.opener.kind(), "the caller has compared them");
        match opener {
            Opener::Passphrase(cost) => self.secret.stretch(salt, cost),
            Opener::Key => self.secret.derive(salt, &[b"mason crypto key slot", id]),
        }
    }

    /// A key slot that this opens. Takes a while if it is a passphrase.
    pub(super) fn slot(&self, id: &Id, number: usize, master: &Secret) -> Result<Slot> {
        let salt = random()?;
        let context = bound(id, &[number as u32, self.opener.kind()]);
        let master = self.key(id, &salt, self.opener)?.wrap(master, &context)?;
        Ok(Slot { opener: self.opener, salt, master })
    }

    /// The master key. Takes a while if this is a passphrase.
    ///
    /// # Errors
    /// [`Kind::Denied`] if no slot opens.
    pub(super) fn open(&self, id: &Id, slots: &[Option<Slot>; SLOTS]) -> Result<Secret> {
        for (number, slot) in slots.iter().enumerate() {
            let Some(slot) = slot.as_ref().filter(|slot| slot.opener.kind() == self.opener.kind()) else {
                continue;
            };
            let context = bound(id, &[number as u32, slot.opener.kind()]);
            if let Some(master) = self.key(id, &slot.salt, slot.opener)?.unwrap(&slot.master, &context) {
                return Ok(master);
            }
        }
        Err(Error::new(Kind::Denied, "no key slot opens with this key"))
    }
}

/// What follows from the master key.
pub(super) struct Master {
    pub(super) key: Secret,
    /// Of the header's HMAC.
    pub(super) mac: Secret,
    wrapping: Secret,
}

impl Master {
    pub(super) fn new(id: &Id, key: Secret) -> Result<Master> {
        let mac = key.derive(id, &[b"mason crypto header"])?;
        let wrapping = key.derive(id, &[b"mason crypto data keys"])?;
        Ok(Master { key, mac, wrapping })
    }

    /// A new data key, and what the header is to keep of it.
    pub(super) fn draw(&self, volume: &Id, id: u32) -> Result<(Secret, DataKey)> {
        let key = Secret::draw()?;
        let wrapped = self.wrapping.wrap(&key, &bound(volume, &[id]))?;
        Ok((key, DataKey { id, key: wrapped }))
    }

    /// A data key of the header.
    pub(super) fn data_key(&self, volume: &Id, wrapped: &DataKey) -> Result<Secret> {
        self.wrapping
            .unwrap(&wrapped.key, &bound(volume, &[wrapped.id]))
            .ok_or_else(|| Error::new(Kind::Io, format!("data key {} of the header is damaged", wrapped.id)))
    }
}

/// Where a secret comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    Passphrase(PathBuf),
    Key(PathBuf),
    /// A program and its arguments, which prints a key.
    Command(Vec<String>),
}

impl Source {
    /// Reads it. May wait for a file or a command.
    pub(super) fn read(&self) -> Result<Credential> {
        match self {
            Source::Passphrase(path) => passphrase(read_file(path)?).map_err(|error| error.with_path(path)),
            Source::Key(path) => key(read_file(path)?).map_err(|error| error.with_path(path)),
            Source::Command(command) => key(run(command)?),
        }
    }

    /// Finds out early what is wrong with a file. Commands are run only when a disk is opened.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Source::Command(_) => Ok(()),
            Source::Passphrase(_) | Source::Key(_) => self.read().map(drop),
        }
    }
}

/// A line feed at its end is the editor's, not the passphrase's.
fn passphrase(mut bytes: Zeroizing<Vec<u8>>) -> Result<Credential> {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    if bytes.len() < SHORTEST_PASSPHRASE {
        return Err(Error::invalid(format!("a passphrase has {SHORTEST_PASSPHRASE} bytes at least")));
    }
    Ok(Credential { secret: Secret(bytes), opener: Opener::Passphrase(COST) })
}

fn key(bytes: Zeroizing<Vec<u8>>) -> Result<Credential> {
    if bytes.len() < KEY {
        return Err(Error::invalid(format!(
            "a key has {KEY} bytes at least, and this one has {}",
            bytes.len()
        )));
    }
    Ok(Credential { secret: Secret(bytes), opener: Opener::Key })
}

/// Room for the longest secret, so that it never moves and leaves a copy behind.
fn room() -> Zeroizing<Vec<u8>> {
    Zeroizing::new(Vec::with_capacity(LONGEST + 1))
}

fn bounded(bytes: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>> {
    match bytes.len() > LONGEST {
        true => Err(Error::invalid(format!("a secret has {LONGEST} bytes at most"))),
        false => Ok(bytes),
    }
}

fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = room();
    let file = std::fs::File::open(path);
    let read = file.and_then(|file| file.take(LONGEST as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|error| Error::io(error, "the secret cannot be read").with_path(path))?;
    bounded(bytes).map_err(|error| error.with_path(path))
}

/// What a command prints. It has no input, and what it says on its standard error goes to that of this process.
fn run(command: &[String]) -> Result<Zeroizing<Vec<u8>>> {
    let Some((program, args)) = command.split_first() else {
        return Err(Error::invalid("the command that prints the key has no name"));
    };
    let fault =
        |what: String| Error::new(Kind::Unavailable, format!("{program}, which prints the key, {what}"));
    // This thread may wait and has no runtime; tokio's child is killed when it is dropped.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| Error::io(error, "cannot wait for the command that prints the key"))?;
    runtime.block_on(async {
        let mut command = tokio::process::Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| fault(format!("cannot be run: {error}")))?;
        let output = child.stdout.take();
        let ended = async {
            let mut bytes = room();
            if let Some(output) = output {
                output.take(LONGEST as u64 + 1).read_to_end(&mut bytes).await?;
            }
            Ok::<_, std::io::Error>((child.wait().await?, bytes))
        };
        match rt::timeout(DEADLINE, ended).await {
            None => Err(fault(format!("has not ended within {DEADLINE:?} and was killed"))),
            Some(Err(error)) => Err(fault(format!("cannot be read: {error}"))),
            // One that prints too much is ended by a broken pipe, which says less.
            Some(Ok((status, bytes))) if !status.success() && bytes.len() <= LONGEST => {
                Err(fault(format!("has failed: {status}")))
            }
            Some(Ok((_, bytes))) => bounded(bytes),
        }
    })
}
