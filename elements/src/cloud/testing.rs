//! A store in memory that fails in every way, for tests: its seed decides how, and the test when what came late lands.
#![allow(clippy::unwrap_used, reason = "tests panic")]

use super::store::{Attempt, Failure, Head, Listed, ObjectStore, Put};
use blockmason::data::Data;
use blockmason::element::BoxFuture;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// How likely what is, of 1000 requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Odds {
    /// The request fails and is not done.
    pub(crate) fails: u32,
    /// It is done, and its answer lost.
    pub(crate) lost: u32,
    /// Its answer is lost, and it is done when the test says so, or never.
    pub(crate) late: u32,
}

type Objects = BTreeMap<String, (Data, String)>;

/// What changes the store.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Put { key: String, body: Data, id: String, absent: bool },
    Delete(Vec<String>),
}

/// A rule of a test: requests whose name and key it takes wait until it is dropped from the store.
type Holds = Box<dyn Fn(&str, &str) -> bool + Send>;

#[derive(Default)]
struct Inner {
    objects: Objects,
    late: Vec<Change>,
    odds: Odds,
    rng: fastrand::Rng,
    holds: Option<Holds>,
    held: usize,
    ignores_conditions: bool,
    down: bool,
}

/// See the module.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<Inner>>, Arc<Notify>);

impl Memory {
    pub(crate) fn new(seed: u64) -> Memory {
        let memory = Memory::default();
        memory.0.lock().unwrap().rng = fastrand::Rng::with_seed(seed);
        memory
    }

    pub(crate) fn set_odds(&self, odds: Odds) {
        self.0.lock().unwrap().odds = odds;
    }

    pub(crate) fn ignore_conditions(&self) {
        self.0.lock().unwrap().ignores_conditions = true;
    }

    pub(crate) fn set_down(&self, down: bool) {
        self.0.lock().unwrap().down = down;
    }

    /// From now on, and until [`Memory::release`], such requests wait before they do anything.
    pub(crate) fn hold(&self, which: impl Fn(&str, &str) -> bool + Send + 'static) {
        self.0.lock().unwrap().holds = Some(Box::new(which));
    }

    pub(crate) fn release(&self) {
        self.0.lock().unwrap().holds = None;
        self.1.notify_waiters();
    }

    /// Waits until that many requests are held.
    pub(crate) async fn held(&self, count: usize) {
        while self.holds() < count {
            tokio::task::yield_now().await;
        }
    }

    /// How many are held now.
    pub(crate) fn holds(&self) -> usize {
        self.0.lock().unwrap().held
    }

    /// Lets some of what was late happen.
    pub(crate) fn land(&self, share: f64) {
        let mut inner = self.0.lock().unwrap();
        for change in std::mem::take(&mut inner.late) {
            if inner.rng.f64() < share {
                inner.change(change);
            } else {
                inner.late.push(change);
            }
        }
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        self.0.lock().unwrap().objects.keys().cloned().collect()
    }

    /// Bytes of all objects whose keys begin so, below the prefix of these tests.
    pub(crate) fn stored(&self, prefix: &str) -> u64 {
        let (inner, prefix) = (self.0.lock().unwrap(), format!("some/disk/{prefix}"));
        let objects = inner.objects.iter().filter(|(key, _)| key.starts_with(&prefix));
        objects.map(|(_, (data, _))| data.len() as u64).sum()
    }

    pub(crate) fn remove(&self, key: &str) {
        self.0.lock().unwrap().objects.remove(key).unwrap();
    }

    pub(crate) fn bytes(&self, key: &str) -> Vec<u8> {
        self.0.lock().unwrap().objects[key].0.to_vec()
    }

    pub(crate) fn overwrite(&self, key: &str, bytes: &[u8]) {
        self.0.lock().unwrap().objects.get_mut(key).unwrap().0 = Data::copy_of(bytes);
    }

    /// A copy of everything, as it is now.
    pub(crate) fn copy(&self) -> Memory {
        let memory = Memory::new(1);
        memory.0.lock().unwrap().objects = self.0.lock().unwrap().objects.clone();
        memory
    }

    /// Lets others have turns, waits if it is held, and then does what the seed says.
    async fn ask<T>(
        &self,
        name: &'static str,
        key: &str,
        change: Option<Change>,
        found: impl Fn(&Objects) -> T,
    ) -> Attempt<(T, Option<Put>)> {
        let turns = {
            let mut inner = self.0.lock().unwrap();
            inner.rng.u32(..6)
        };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        self.wait_while_held(name, key).await;
        let mut inner = self.0.lock().unwrap();
        if inner.down {
            return Err(Failure::Again("it is down".to_owned()));
        }
        let (odds, dice) = (inner.odds, inner.rng.u32(..1000));
        if dice < odds.fails {
            return Err(Failure::Again("503".to_owned()));
        }
        if let Some(change) = &change
            && dice < odds.fails + odds.late
        {
            inner.late.push(change.clone());
            return Err(Failure::Again("no answer".to_owned()));
        }
        let put = change.map(|change| inner.change(change));
        if dice < odds.fails + odds.late + odds.lost {
            return Err(Failure::Again("connection lost".to_owned()));
        }
        Ok((found(&inner.objects), put))
    }

    async fn wait_while_held(&self, name: &str, key: &str) {
        let holds = |inner: &Inner| inner.holds.as_ref().is_some_and(|holds| holds(name, key));
        let mut counted = false;
        loop {
            let released = self.1.notified();
            {
                let mut inner = self.0.lock().unwrap();
                if !holds(&inner) {
                    inner.held -= usize::from(counted);
                    return;
                }
                inner.held += usize::from(!std::mem::replace(&mut counted, true));
            }
            released.await;
        }
    }
}

impl Inner {
    fn change(&mut self, change: Change) -> Put {
        match change {
            Change::Put { key, absent, .. }
                if absent && !self.ignores_conditions && self.objects.contains_key(&key) =>
            {
                return Put::Exists;
            }
            Change::Put { key, body, id, .. } => {
                self.objects.insert(key, (body, id));
            }
            Change::Delete(keys) => keys.iter().for_each(|key| {
                self.objects.remove(key);
            }),
        }
        Put::Done
    }
}

impl ObjectStore for Memory {
    fn put<'a>(&'a self, key: &'a str, body: Data, id: &'a str, absent: bool) -> BoxFuture<'a, Attempt<Put>> {
        Box::pin(async move {
            let change = Change::Put { key: key.to_owned(), body: body.stable(), id: id.to_owned(), absent };
            Ok(self.ask("put", key, Some(change), |_| ()).await?.1.unwrap())
        })
    }

    fn get_range<'a>(&'a self, key: &'a str, range: Range<u64>) -> BoxFuture<'a, Attempt<Option<Data>>> {
        Box::pin(async move {
            let cut = |data: &Data| {
                data.slice(
                    range.start.min(data.len() as u64) as usize..range.end.min(data.len() as u64) as usize,
                )
            };
            Ok(self.ask("get", key, None, |objects| objects.get(key).map(|(data, _)| cut(data))).await?.0)
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Attempt<Option<Head>>> {
        Box::pin(async move {
            let head =
                |(data, id): &(Data, String)| Head { len: data.len() as u64, put_id: Some(id.clone()) };
            Ok(self.ask("head", key, None, |objects| objects.get(key).map(head)).await?.0)
        })
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Attempt<()>> {
        Box::pin(async move {
            self.ask("delete", &keys[0], Some(Change::Delete(keys.to_vec())), |_| ()).await.map(|_| ())
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, most: u32) -> BoxFuture<'a, Attempt<Vec<Listed>>> {
        Box::pin(async move {
            let listed = |objects: &Objects| {
                let found = objects.iter().filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after);
                let found = found.map(|(key, (data, _))| Listed { key: key.clone(), len: data.len() as u64 });
                found.take(most as usize).collect()
            };
            Ok(self.ask("list", prefix, None, listed).await?.0)
        })
    }

    fn dangers(&self) -> BoxFuture<'_, Attempt<Vec<String>>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}
