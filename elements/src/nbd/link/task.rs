//! One connection of a client on one shard: its queue, and the task that owns its socket.

use super::*;

/// A connection in its transmission phase.
struct Conn {
    server: Server<Socket>,
    manner: Manner,
    sender: Sender,
    receiver: Receiver,
    /// Looks for requests that take too long.
    timer: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Conn {
    fn new(server: Server<Socket>) -> Conn {
        let manner = Manner { style: server.style, allocation: allocation(&server) };
        Conn { server, manner, sender: Sender::default(), receiver: Receiver::default(), timer: None }
    }

    fn poll_send(&mut self, task: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.sender.poll_send(Pin::new(&mut self.server.stream), task)
    }

    fn put(&mut self, header: &RequestHeader, data: Data) {
        let (bytes, len) = encode(self.manner.style, header);
        self.sender.head(&bytes[..len]);
        self.sender.data(data);
    }
}

/// What a shard keeps for a client. Requests wait in it whether there is a connection or not.
pub(super) struct Link {
    client: Arc<Client>,
    calls: RefCell<Calls>,
    /// The task, and whether it was woken since it last looked.
    waker: RefCell<Option<Waker>>,
    woken: Cell<bool>,
    connected: Cell<bool>,
    /// Replies that had come by the end of the last turn.
    answered: Cell<u64>,
    /// Since when no reply has come although one was wanted, or no connection was there.
    outage: Cell<Option<Instant>>,
    /// How long requests wait in an outage.
    patience: Cell<Duration>,
    /// Attempts to connect in this outage.
    attempts: Cell<u32>,
    /// What went wrong last.
    trouble: RefCell<String>,
    /// The task has ended.
    closed: Cell<bool>,
    orders: Cell<Orders>,
}

/// The entry in the shard's table.
struct Entry(Rc<Link>);

impl Link {
    /// This shard's link, made when it is first asked for.
    pub(super) fn of(client: &Arc<Client>, shard: &Rc<Shard>) -> Rc<Link> {
        let entry = shard.local(client.id, || {
            let link = Rc::new(Link {
                client: client.clone(),
                calls: RefCell::default(),
                waker: RefCell::default(),
                woken: Cell::new(false),
                connected: Cell::new(false),
                answered: Cell::new(0),
                outage: Cell::new(Some(rt::now())),
                // The first connection of a link is no reconnection.
                patience: Cell::new(client.target.reconnect.max(handshake(&client.target))),
                attempts: Cell::new(0),
                trouble: RefCell::default(),
                closed: Cell::new(false),
                orders: Cell::default(),
            });
            client.links.fetch_add(1, Ordering::Relaxed);
            drop(tokio::task::spawn_local(link.clone().run()));
            Entry(link)
        });
        entry.0.clone()
    }

    /// Queues a request. Errors: the server is not there, and was not for too long.
    pub(super) fn submit(self: &Rc<Self>, wanted: Wanted) -> Result<Answered> {
        if self.client.is_changed.load(Ordering::Acquire) {
            return Err(lock(&self.client.changed).clone().unwrap_or_else(gone));
        }
        if self.closed.get() {
            return Err(gone());
        }
        let waits = if self.connected.get() { None } else { self.outage.get() };
        if waits.is_some_and(|since| rt::now() >= since + self.patience.get()) {
            return Err(self.away());
        }
        let slot = self.calls.borrow_mut().insert(wanted, waits);
        self.wake();
        Ok(Answered { link: self.clone(), slot, over: false })
    }

    fn wake(&self) {
        if self.woken.replace(true) {
            return;
        }
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    fn away(&self) -> Error {
        let trouble = self.trouble.borrow();
        Error::new(Kind::Unavailable, format!("{} is away: {trouble}", self.client.target.uri))
    }

    /// Connects and serves, again and again, until the client is closed.
    async fn run(self: Rc<Self>) {
        let mut orders = self.client.orders.subscribe();
        self.orders.set(*orders.borrow_and_update());
        while let Some(mut conn) = self.connect(&mut orders).await {
            self.client.connected.fetch_add(1, Ordering::Relaxed);
            self.connected.set(true);
            if self.calls.borrow().is_idle() {
                // Nobody waits, and silence is no sign of trouble.
                self.outage.set(None);
            }
            let since = rt::now();
            self.patience.set(self.client.target.reconnect);
            let why = self.drive(&mut conn, &mut orders).await;
            self.connected.set(false);
            self.client.connected.fetch_sub(1, Ordering::Relaxed);
            let Some(why) = why else {
                self.leave(conn).await;
                break;
            };
            if rt::now() - since >= HANDSHAKE {
                self.attempts.set(0);
            }
            self.interrupt(&why);
        }
        self.closed.set(true);
        self.client.links.fetch_sub(1, Ordering::Relaxed);
        self.fail(Duration::ZERO, &gone());
        if let Some(shard) = Shard::current() {
            shard.forget::<Entry>(self.client.id);
        }
    }

    /// True if the client closes, else whether new connections are asked for.
    fn take_orders(&self, orders: &mut watch::Receiver<Orders>) -> (bool, bool) {
        let (old, new) = (self.orders.get(), *orders.borrow_and_update());
        self.orders.set(new);
        (new.close, new.reconnect != old.reconnect)
    }

    /// A connection to the same disk as before. None once the client closes.
    async fn connect(&self, orders: &mut watch::Receiver<Orders>) -> Option<Conn> {
        let first = lock(&self.client.first).take();
        if let Some(mut server) = first
            && server.stream.socket_mut().unpark().is_ok()
        {
            return Some(Conn::new(server));
        }
        loop {
            if self.orders.get().close {
                return None;
            }
            let server = match self.attempt(orders).await {
                None => continue,
                Some(Ok(server)) => server,
                Some(Err(error)) => {
                    tracing::debug!("an attempt to connect failed: {error}");
                    *self.trouble.borrow_mut() = error.to_string();
                    continue;
                }
            };
            let offer = Offer::of(&server);
            if offer == self.client.offer {
                self.client.reconnects.fetch_add(1, Ordering::Relaxed);
                return Some(Conn::new(server));
            }
            self.refuse(&offer);
            // Only somebody who has looked at it can say that it may go on.
            while self.client.is_changed.load(Ordering::Acquire) {
                if orders.changed().await.is_err() || self.take_orders(orders).0 {
                    return None;
                }
            }
        }
    }

    /// One attempt to connect, after a pause if there were others. None if it was overtaken by orders.
    async fn attempt(&self, orders: &mut watch::Receiver<Orders>) -> Option<Result<Server<Socket>>> {
        let attempts = self.attempts.get();
        self.attempts.set(attempts.saturating_add(1));
        let mut attempt = pin!(async {
            if attempts > 0 {
                let pause = (FIRST_PAUSE * (1 << attempts.min(10))).min(LONGEST_PAUSE);
                // Links that have lost the same server do not come back all at once.
                let part = Shard::current().map_or(1.0, |shard| shard.random(|rng| rng.f64()));
                rt::sleep(pause.mul_f64(0.5 + part / 2.0)).await;
            }
            dial(&self.client.target).await
        });
        loop {
            tokio::select! {
                biased;
                result = &mut attempt => return Some(result),
                () = self.overdue() => self.fail(self.patience.get(), &self.away()),
                changed = orders.changed() => {
                    let (close, again) = self.take_orders(orders);
                    if close || again || changed.is_err() {
                        self.attempts.set(0);
                        return None;
                    }
                }
            }
        }
    }

    /// Resolves when the deadline of this outage passes; never if it has.
    async fn overdue(&self) {
        let deadline = self.outage.get().map(|since| since + self.patience.get());
        let left = deadline.and_then(|deadline| deadline.checked_duration_since(rt::now()));
        match left.filter(|left| !left.is_zero()) {
            Some(left) => rt::sleep(left).await,
            None => std::future::pending().await,
        }
    }

    /// Fails everything, now and from now on: the disk is another one.
    fn refuse(&self, offer: &Offer) {
        let (was, uri) = (&self.client.offer, &self.client.target.uri);
        let what = if was.size != offer.size {
            format!("it had {} bytes and has {} now", was.size, offer.size)
        } else {
            "it offers other abilities than before".to_owned()
        };
        let error = Error::new(Kind::Unavailable, format!("{uri} came back as another disk: {what}"));
        tracing::error!("{error}");
        self.client.notice(&error);
        *lock(&self.client.changed) = Some(error.clone());
        self.client.is_changed.store(true, Ordering::Release);
        self.fail(Duration::ZERO, &error);
    }

    /// Fails what has waited for so long. Only without a connection.
    fn fail(&self, patience: Duration, error: &Error) {
        self.calls.borrow_mut().expire(rt::now(), patience, error, &self.client.fence);
    }

    /// The connection is gone: what has no reply waits for the next one.
    fn interrupt(&self, why: &str) {
        let uri = &self.client.target.uri;
        let since = match self.outage.get() {
            Some(since) => {
                tracing::debug!("{uri} is lost again: {why}");
                since
            }
            None => {
                tracing::warn!("{uri} is lost: {why}");
                self.client.tell_lost(why);
                rt::now()
            }
        };
        self.outage.set(Some(since));
        self.client.losses.interrupted();
        *self.trouble.borrow_mut() = why.to_owned();
        self.calls.borrow_mut().interrupt(since, &self.client.fence);
        self.fail(self.patience.get(), &self.away());
    }

    /// Serves a connection. Some says why it broke; None if the client closes and all is answered.
    async fn drive(&self, conn: &mut Conn, orders: &mut watch::Receiver<Orders>) -> Option<String> {
        loop {
            tokio::select! {
                biased;
                why = std::future::poll_fn(|task| self.turn(conn, task)) => return Some(why),
                changed = orders.changed() => match self.take_orders(orders) {
                    _ if changed.is_err() => break,
                    (true, _) => break,
                    (false, true) => return Some("somebody asked for new connections".to_owned()),
                    (false, false) => {}
                }
            }
            if self.orders.get().close {
                break;
            }
        }
        let idle = std::future::poll_fn(|task| match self.turn(conn, task) {
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending if self.calls.borrow().is_idle() => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        });
        if rt::timeout(PATIENCE, idle).await.is_none() {
            tracing::warn!("{} has not answered all when it was closed", self.client.target.uri);
        }
        None
    }

    /// Sends what was submitted, takes in what has come. Ready only if the connection is broken.
    fn turn(&self, conn: &mut Conn, task: &mut Context<'_>) -> Poll<String> {
        self.register(task.waker());
        self.pump(conn, task.waker());
        if let Poll::Ready(Err(error)) = conn.poll_send(task) {
            return Poll::Ready(format!("the connection failed: {error}"));
        }
        let mut calls = self.calls.borrow_mut();
        let stream = Pin::new(&mut conn.server.stream);
        let broken = conn.receiver.poll(stream, conn.manner, &mut calls, &self.client.fence, task);
        self.client.losses.answered(std::mem::take(&mut calls.unflushed));
        if self.answered.replace(calls.answered) != calls.answered && self.outage.take().is_some() {
            self.attempts.set(0);
            tracing::debug!("{} answers again", self.client.target.uri);
            self.client.tell_back();
        }
        let why = ready_or(broken, || self.poll_timeout(conn, &calls, task));
        why.map_or(Poll::Pending, Poll::Ready)
    }

    fn register(&self, waker: &Waker) {
        let mut known = self.waker.borrow_mut();
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
        self.woken.set(false);
    }

    /// Encodes what may be sent.
    fn pump(&self, conn: &mut Conn, waker: &Waker) {
        let mut calls = self.calls.borrow_mut();
        if calls.unsent.is_empty() {
            return;
        }
        let now = self.client.target.timeout.map(|_| rt::now());
        let fence = self.client.fence.is_up().then_some(&self.client.fence);
        let unsent = std::mem::take(&mut calls.unsent);
        for slot in unsent {
            let Some(call) = calls.call(slot) else { continue };
            let held = call.wanted.is_change()
                && fence.is_some_and(|fence| fence.blocks(&call.wanted.range(), call.fence, waker));
            let data = call.wanted.data.clone();
            if held {
                calls.unsent.push_back(slot);
            } else if let Some(header) = calls.mark_sent(slot, now) {
                conn.put(&header, data);
            }
        }
    }

    /// Says so if a request has been unanswered for too long.
    fn poll_timeout(&self, conn: &mut Conn, calls: &Calls, task: &mut Context<'_>) -> Option<String> {
        let timeout = self.client.target.timeout?;
        loop {
            if conn.timer.is_none() {
                let due = calls.oldest()? + timeout;
                let now = rt::now();
                if due <= now {
                    return Some(format!("a request was not answered within {timeout:?}"));
                }
                conn.timer = Some(Box::pin(rt::sleep(due - now)));
            }
            let timer = conn.timer.as_mut()?;
            let Poll::Ready(()) = timer.as_mut().poll(task) else { return None };
            conn.timer = None;
        }
    }

    /// Takes leave of the server.
    async fn leave(&self, mut conn: Conn) {
        conn.put(&goodbye(), Data::empty());
        let farewell = async {
            std::future::poll_fn(|task| conn.poll_send(task)).await?;
            tokio::io::AsyncWriteExt::shutdown(&mut conn.server.stream).await
        };
        // Only a courtesy: whether it arrives does not matter.
        let _ = rt::timeout(Duration::from_secs(1), farewell).await;
    }
}

fn ready_or<T>(poll: Poll<T>, other: impl FnOnce() -> Option<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => other(),
    }
}

fn gone() -> Error {
    Error::new(Kind::Unavailable, "the NBD client has been closed")
}

/// The reply to a request. Dropping it does not stop the request.
pub(super) struct Answered {
    link: Rc<Link>,
    slot: u32,
    over: bool,
}

impl Future for Answered {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        let outcome = self.link.calls.borrow_mut().poll(self.slot, task.waker());
        let reply = ready!(outcome.map_or(Poll::Pending, Poll::Ready));
        self.over = true;
        Poll::Ready(reply)
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        if !self.over {
            self.link.calls.borrow_mut().abandon(self.slot);
        }
    }
}
