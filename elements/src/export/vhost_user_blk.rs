//! An export for virtual machines: a virtio block device over vhost-user, in the guest's own memory.

use crate::export::socket::{Mode, rights};
use crate::vhost::device::{MOST_QUEUES, Terms};
use crate::vhost::export::{Export, Exports};
use blockmason::describe::{Build, ElementType, Family, Ports};
use blockmason::element::BoxFuture;
use blockmason::lang::value::{Time, Uri};
use blockmason::{Children, Cx, Element, Error, Flow, Geometry, Luggage, Open, Prepared, Request, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a serial number.
const SERIAL: usize = 20;

blockmason::params! {
    /// A disk for virtual machines.
    pub struct Params {
        /// Where to listen: `unix:PATH`. A virtual machine monitor connects there.
        listen: Uri,
        /// Queues that a guest may have, one for each of its processors as a rule. They are spread over the
        /// threads that carry requests.
        queues: u16 = "1",
        /// The longest queue, a power of two up to 1024.
        queue_size: u16 = "256",
        /// The disk's serial number as guests see it, at most 20 characters (`/dev/disk/by-id/virtio-...`).
        serial: String = "",
        /// Guests may not write, whatever lies below.
        readonly: bool = "no",
        /// How long an idle queue looks for requests before it waits to be told: lower latency for processor time.
        /// Looks for a shorter time when that has not been worth it.
        poll: Time = "0s",
        /// Permission bits of the socket. Without them the umask decides.
        mode: Option<Mode>,
        /// Owner of the socket, by name or number.
        owner: Option<String>,
        /// Group of the socket, by name or number.
        group: Option<String>,
        /// The graph listens and says how large the disk is, and does nothing else before `mason activate`: for a virtual
        /// machine that moves here from another host.
        standby: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "vhost_user_blk",
    summary: "a disk for virtual machines, in the guest's own memory",
    doc: "A virtio block device over vhost-user, for QEMU (`vhost-user-blk-pci`), cloud-hypervisor and others. Requests \
          are read from the guest's queues and their data moves between its memory and the disk without a copy.\n\n\
          **When this program dies** or is killed, a guest whose virtual machine monitor reconnects sees a pause: requests \
          in flight are executed again by the next `mason run`, and completed once. What was acknowledged must then still \
          be there: elements that keep acknowledged writes in this process's memory (`mem`, `volatile`) refuse to stand \
          below this export without their `(lossy yes)`. Only one front-end at a time runs the queues.\n\n\
          **Durability.** The guest sees a disk with a volatile cache and flushes it. If it turns the cache off, or knows no \
          flushes, every write is durable when it completes; that choice is kept in the state folder.\n\n\
          **A disk that grows** when its graph is changed is seen by running guests at once.\n\n\
          A guest is not trusted: a queue that breaks the rules of virtio is stopped, with one line in the log, and nothing \
          else is. Rings are split ones; packed rings are not offered.",
    family: Family::Export,
    params: Params::PARAMS,
    ports: Ports::SOURCE,
    passes_through: true,
    example: "element Guest (type vhost_user_blk) (listen unix:vm1.sock) (queues 2)\n\
              element Disk (type file) (path vm1.img) (size 64M)\n\
              Guest -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(VhostUserBlk::new(build)?)),
    ..ElementType::BASE
};

struct VhostUserBlk {
    params: Params,
    path: PathBuf,
    /// Exists while a guest does without a volatile cache.
    record: PathBuf,
    export: Mutex<Option<Export>>,
}

impl VhostUserBlk {
    fn new(build: &Build<'_>) -> Result<VhostUserBlk> {
        let params = build.read(Params::from)?;
        if params.listen.scheme() != "unix" {
            return Err(Error::invalid("guests come over a socket in the file system: (listen unix:PATH)"));
        }
        if !(1..=MOST_QUEUES).contains(&params.queues) {
            return Err(Error::invalid(format!("a guest has between 1 and {MOST_QUEUES} queues")));
        }
        if !params.queue_size.is_power_of_two() || !(2..=1024).contains(&params.queue_size) {
            return Err(Error::invalid("a queue has a power of two of entries, from 2 to 1024"));
        }
        if params.serial.len() > SERIAL {
            return Err(Error::invalid(format!("a serial number has at most {SERIAL} bytes")));
        }
        let record = build.state_dir.join("write-through").join(format!("{}.{}", build.graph, build.name));
        let path = PathBuf::from(params.listen.rest());
        Ok(VhostUserBlk { params, path, record, export: Mutex::new(None) })
    }

    fn export(&self) -> MutexGuard<'_, Option<Export>> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Element for VhostUserBlk {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }

    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        if below.volatile {
            return Err(Error::invalid(
                "a virtual machine outlives this program, and the disk below keeps what is written in this program's \
                 memory: put (lossy yes) on that element if the loss is acceptable",
            ));
        }
        Ok(Prepared::of(below.above()))
    }

    fn stands_by(&self) -> bool {
        self.params.standby
    }

    fn open(&self, open: &Open<'_>) -> Result<Option<String>> {
        let params = &self.params;
        let terms = Terms {
            queues: params.queues,
            queue_size: params.queue_size,
            serial: params.serial.clone(),
            read_only: params.readonly,
            poll: params.poll.0,
        };
        let rights = rights(params.mode, params.owner.as_deref(), params.group.as_deref())?;
        let exports = open.host.service(Exports::default);
        let socket = (self.path.as_path(), rights);
        let export = exports.open(open.host, socket, (open.disk, open.name), terms, self.record.clone())?;
        *self.export() = Some(export);
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        Ok(Some(format!("vhost-user+unix://{}", path.display())))
    }

    fn close(&self) {
        self.export().take();
    }

    fn hand_over<'a>(&'a self, _leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        let luggage = self.export().as_ref().map(Export::hand_over);
        Box::pin(async move {
            match luggage {
                Some(luggage) => luggage.await,
                None => Ok(Luggage::none()),
            }
        })
    }

    fn take_over<'a>(&'a self, luggage: Luggage, coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        let taken = self.export().as_ref().map(|export| export.take_over(coming.host, luggage));
        Box::pin(async move {
            taken.ok_or_else(|| Error::internal("front-ends have come before it listens"))?.await
        })
    }

    fn keeps_clients(&self, below: Option<&Geometry>) -> Result<()> {
        self.export().as_ref().map_or(Ok(()), |export| export.device().clients.can_live_with(below))
    }

    fn dismiss_clients(&self, below: Option<&Geometry>) {
        if let Some(export) = self.export().as_ref() {
            export.device().clients.dismiss(below);
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{live, run};

    async fn refused(host: &std::sync::Arc<blockmason::Host>, params: &str, disk: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let listen = if params.contains("listen") {
            String::new()
        } else {
            format!("(listen unix:{}/vm.sock)", folder.path().display())
        };
        let graph = format!(
            "element Client (type vhost_user_blk) {listen} {params}\nelement Disk (type {disk}) (size 1M)\nClient -> Disk"
        );
        live(host, crate::ALL, &graph)
            .await
            .map(drop)
            .map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        run(1, async |host| {
            for (params, disk, why) in [
                ("(listen tcp:127.0.0.1:1)", "null", "over a socket in the file system"),
                ("(queues 0)", "null", "between 1 and 256 queues"),
                ("(queue_size 100)", "null", "a power of two"),
                ("(serial 123456789012345678901)", "null", "at most 20 bytes"),
                ("", "mem", "(lossy yes)"),
            ] {
                let error = refused(&host, params, disk).await;
                assert!(error.contains(why), "{params} {disk}: {error:?}");
            }
            assert_eq!(refused(&host, "(queues 4) (queue_size 128) (serial vm1)", "null").await, "");
        });
    }
}
