//! Object stores: what one attempt at something is, and how it is tried again.

use super::counts::{Call, Counts};
use blockmason::data::Data;
use blockmason::element::BoxFuture;
use blockmason::{Error, Kind, Result, rt};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may have been done or not; another attempt may do it: a lost connection, a server that is busy or broken.
    Again(String),
    /// Another attempt makes no sense.
    Never(Error),
}

/// What became of one attempt.
pub(crate) type Attempt<T> = std::result::Result<T, Failure>;

/// What became of an attempt to put an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is there, durably.
    Done,
    /// Something has that key already. Only where that was the condition.
    Exists,
}

/// What a store knows of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Bytes.
    pub(crate) len: u64,
    /// The id that it was put with.
    pub(crate) put_id: Option<String>,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The whole key.
    pub(crate) key: String,
    /// Bytes.
    pub(crate) len: u64,
}

/// A store of objects: each method is one request, and tries once. Keys are whole.
pub(crate) trait ObjectStore: Send + Sync {
    /// Puts an object, with the id in its metadata. With `absent`, only where there is none of that key, which
    /// the store decides atomically; one that ignores this is found out by [`Bucket::probe`].
    fn put<'a>(&'a self, key: &'a str, body: Data, id: &'a str, absent: bool) -> BoxFuture<'a, Attempt<Put>>;

    /// The bytes of a range, fewer where the object ends before; None if there is no object.
    fn get_range<'a>(&'a self, key: &'a str, range: Range<u64>) -> BoxFuture<'a, Attempt<Option<Data>>>;

    /// What is known of an object; None if there is none.
    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Attempt<Option<Head>>>;

    /// Deletes objects, at most [`DELETE_MOST`], whether they are there or not.
    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Attempt<()>>;

    /// Up to `most` objects (at most 1000) whose keys begin with `prefix` and come after `after`, in order of their keys.
    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, most: u32) -> BoxFuture<'a, Attempt<Vec<Listed>>>;

    /// What of the bucket's settings endangers a disk in it, in sentences; see `mason bucket check`.
    fn dangers(&self) -> BoxFuture<'_, Attempt<Vec<String>>>;
}

/// The most keys of one [`ObjectStore::delete_many`].
pub(crate) const DELETE_MOST: usize = 1000;

/// The prefix as keys have it: empty, or with one slash at its end.
pub(crate) fn prefix(text: &str) -> String {
    let text = text.trim_matches('/');
    if text.is_empty() { String::new() } else { format!("{text}/") }
}

/// How long an attempt may take, and longer the more bytes it moves.
const ATTEMPT: Duration = Duration::from_secs(20);
/// The slowest link that is waited for, in bytes a second.
const SLOWEST: u64 = 1 << 20;
/// The first pause between attempts; each is up to twice the one before.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is told about the store: that it does not answer, that it does again.
type Say = Box<dyn Fn(&str) + Send + Sync>;

/// What lies below one prefix of a store. Requests are tried again until they have an answer, or for as long as this handle is
/// patient; keys are below the prefix.
pub(crate) struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    /// How long a request is tried again; None for ever.
    patience: Option<Duration>,
    pub(crate) counts: Arc<Counts>,
    trouble: Arc<Trouble>,
}

/// Whether the store answers, for events.
#[derive(Default)]
struct Trouble {
    down: AtomicBool,
    say: Mutex<Option<Say>>,
}

impl Trouble {
    fn say(&self, message: &str) {
        if let Some(say) = &*self.say.lock().unwrap_or_else(PoisonError::into_inner) {
            say(message);
        }
    }
}

impl Bucket {
    /// `prefix` is empty or ends with a slash.
    pub(crate) fn new(store: Arc<dyn ObjectStore>, prefix: &str, patience: Option<Duration>) -> Bucket {
        let (counts, trouble) = Default::default();
        Bucket { store, prefix: prefix.to_owned(), patience, counts, trouble }
    }

    /// The same whose requests are counted there.
    pub(crate) fn counted(self, counts: Arc<Counts>) -> Bucket {
        Bucket { counts, ..self }
    }

    /// The same with another patience.
    pub(crate) fn with_patience(&self, patience: Option<Duration>) -> Bucket {
        let (store, prefix) = (self.store.clone(), self.prefix.clone());
        Bucket { store, prefix, patience, counts: self.counts.clone(), trouble: self.trouble.clone() }
    }

    /// Whom to tell when the store does not answer any more, and when it does again.
    pub(crate) fn tell(&self, say: impl Fn(&str) + Send + Sync + 'static) {
        *self.trouble.say.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(say));
    }

    /// True while the last attempt had no answer.
    pub(crate) fn is_down(&self) -> bool {
        self.trouble.down.load(Ordering::Relaxed)
    }

    /// Tries until there is an answer. An attempt that takes longer than what `bytes` may take counts as failed, which says
    /// nothing about whether it is done.
    async fn persist<T, F>(&self, what: &str, key: &str, bytes: u64, attempt: impl Fn(u32) -> F) -> Result<T>
    where
        F: Future<Output = Attempt<T>>,
    {
        let begun = rt::now();
        let mut pause = PAUSE;
        for round in 0.. {
            let time = ATTEMPT + Duration::from_secs(bytes / SLOWEST);
            let late = || Err(Failure::Again(format!("no answer within {} s", time.as_secs())));
            let why = match rt::timeout(time, attempt(round)).await.unwrap_or_else(late) {
                Ok(done) => {
                    if self.trouble.down.swap(false, Ordering::Relaxed) {
                        self.trouble.say("the store answers again");
                    }
                    return Ok(done);
                }
                Err(Failure::Never(error)) => return Err(refused(error, what).with_path(key)),
                Err(Failure::Again(why)) => why,
            };
            // The first failures are every day's business.
            if round >= 2 && !self.trouble.down.swap(true, Ordering::Relaxed) {
                self.trouble.say(&format!("the store does not {what} {key}: {why}; it is tried again"));
            }
            if self.patience.is_some_and(|patience| begun.elapsed() + pause > patience) {
                let message = format!("the store does not {what} it: {why}");
                return Err(Error::new(Kind::Unavailable, message).with_path(key));
            }
            rt::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Err(Error::internal("attempts do not end"))
    }

    fn whole(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Puts an object of a key that nothing else has. Durable when it is answered.
    pub(crate) async fn put(&self, key: &str, body: Data) -> Result<()> {
        let (whole, id, len) = (self.whole(key), put_id(), body.len() as u64);
        let put = self.persist("take", &whole, len, |_| {
            self.counts.add(Call::Put, len);
            self.store.put(&whole, body.clone(), &id, false)
        });
        put.await.map(|_| ())
    }

    /// Puts an object where there is none; false if there is another one. Durable when it is answered with true.
    ///
    /// An attempt whose answer was lost may have made it: what is found there is asked for the id that it was put with.
    pub(crate) async fn put_if_absent(&self, key: &str, body: Data) -> Result<bool> {
        let (whole, id, len) = (self.whole(key), put_id(), body.len() as u64);
        let (whole, id) = (whole.as_str(), id.as_str());
        let put = self.persist("take", whole, len, |_| {
            let body = body.clone();
            async move {
                self.counts.add(Call::Put, len);
                if self.store.put(whole, body, id, true).await? == Put::Done {
                    return Ok(true);
                }
                self.counts.add(Call::Head, 0);
                let head = self.store.head(whole).await?;
                let head = head.ok_or_else(|| Failure::Again("it is there and is not".to_owned()))?;
                Ok(head.put_id.as_deref() == Some(id))
            }
        });
        put.await
    }

    /// The bytes of a range of an object, all of them; None if there is no object.
    ///
    /// # Errors
    /// [`Kind::Io`] if the object is shorter.
    pub(crate) async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Option<Data>> {
        let len = range.end - range.start;
        let found = self.get(key, range).await?;
        match found {
            Some(data) if data.len() as u64 != len => {
                let message = format!("it has {} bytes of {len} there: it is damaged", data.len());
                Err(Error::new(Kind::Io, message).with_path(self.whole(key)))
            }
            found => Ok(found),
        }
    }

    /// A whole object of at most `most` bytes; None if there is none.
    ///
    /// # Errors
    /// [`Kind::Io`] if it is larger.
    pub(crate) async fn get_whole(&self, key: &str, most: u64) -> Result<Option<Data>> {
        let found = self.get(key, 0..most + 1).await?;
        if found.as_ref().is_some_and(|data| data.len() as u64 > most) {
            return Err(
                Error::new(Kind::Io, "it is too large to be what it should be").with_path(self.whole(key))
            );
        }
        Ok(found)
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Option<Data>> {
        let (whole, len) = (self.whole(key), range.end - range.start);
        let found = self.persist("give", &whole, len, |_| {
            self.counts.add(Call::Get, 0);
            self.store.get_range(&whole, range.clone())
        });
        let found = found.await?;
        self.counts.moved(Call::Get, found.as_ref().map_or(0, |data| data.len() as u64));
        Ok(found)
    }

    /// Deletes objects, whether they are there or not.
    pub(crate) async fn delete_many(&self, keys: impl IntoIterator<Item = String>) -> Result<()> {
        let keys: Vec<String> = keys.into_iter().map(|key| self.whole(&key)).collect();
        for some in keys.chunks(DELETE_MOST) {
            self.counts.add(Call::Delete, 0);
            self.persist("delete", &some[0], 0, |_| self.store.delete_many(some)).await?;
        }
        Ok(())
    }

    /// The end of the prefix, if objects of a volume that lies one level higher may be there.
    pub(crate) fn is_within(&self) -> Option<&str> {
        let name = self.prefix.trim_end_matches('/').rsplit('/').next()?;
        super::key::FOLDERS.iter().any(|folder| folder.trim_end_matches('/') == name).then_some(name)
    }

    /// The first `most` objects (at most 1000) below a prefix whose keys come after `after`.
    pub(crate) async fn list(&self, prefix: &str, after: &str, most: u32) -> Result<Vec<Listed>> {
        let (whole, after) =
            (self.whole(prefix), if after.is_empty() { String::new() } else { self.whole(after) });
        let found = self.persist("list", &whole, 0, |_| {
            self.counts.add(Call::List, 0);
            self.store.list(&whole, &after, most)
        });
        let mut found = found.await?;
        // Whoever lists goes on after the last one that it was told.
        let mut last = &after;
        for listed in &found {
            if !listed.key.starts_with(&whole) || listed.key <= *last {
                let message = "the store does not list what comes after a key, in their order: nothing can be found there";
                return Err(Error::new(Kind::Io, message).with_path(&whole));
            }
            last = &listed.key;
        }
        for listed in &mut found {
            listed.key = listed.key.strip_prefix(&self.prefix).unwrap_or_default().to_owned();
        }
        Ok(found)
    }

    /// All objects below a prefix, 1000 at a time.
    pub(crate) fn pages<'a>(&'a self, prefix: &'a str) -> Pages<'a> {
        Pages { bucket: self, prefix, after: String::new() }
    }

    /// What of the bucket's settings endangers a disk in it.
    pub(crate) async fn dangers(&self) -> Result<Vec<String>> {
        self.persist("describe", "its settings", 0, |_| self.store.dangers()).await
    }

    /// Whether the store takes "only if it is absent" seriously.
    ///
    /// # Errors
    /// It does not answer, or does not allow what a disk needs.
    pub(crate) async fn probe(&self) -> Result<bool> {
        let key = format!("{}{}", super::key::PROBES, put_id());
        let (first, second) = (Data::copy_of(b"first"), Data::copy_of(b"second"));
        self.put_if_absent(&key, first).await?;
        let fenced = !self.put_if_absent(&key, second).await?;
        let found = self.get_whole(&key, 16).await?.map(|data| data.to_vec());
        let kept = found.as_deref() == Some(b"first");
        self.delete_many([key]).await?;
        Ok(fenced && kept)
    }
}

/// See [`Bucket::pages`].
pub(crate) struct Pages<'a> {
    bucket: &'a Bucket,
    prefix: &'a str,
    after: String,
}

impl Pages<'_> {
    /// The next ones; None at the end. What comes or goes meanwhile may be among them or not.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Listed>>> {
        let listed = self.bucket.list(self.prefix, &self.after, 1000).await?;
        let Some(last) = listed.last() else { return Ok(None) };
        self.after.clone_from(&last.key);
        Ok(Some(listed))
    }
}

/// Which right is lacking is told by what was to be done.
fn refused(error: Error, what: &str) -> Error {
    match error.kind() {
        Kind::Denied => {
            Error::new(Kind::Denied, format!("the store does not {what} it: {}", error.message()))
        }
        _ => error,
    }
}

/// What tells one put from all others.
fn put_id() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}
