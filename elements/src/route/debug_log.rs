//! Writes down every request that passes.

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::FilePath;
use blockmason::{Cx, Element, Error, Flags, Flow, Op, Origin, Reply, Request, Result, rt};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

blockmason::params! {
    /// Writes down every request that passes.
    pub struct Params {
        /// The file to append to, made when it is missing. Without it the lines go to stderr.
        logfile: Option<FilePath>,
        /// Writes nothing for now.
        paused: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "debug_log",
    summary: "passes requests through and writes a line for each",
    doc: "Requests pass unmodified, and so do their replies. When a reply is sent, its line is in the log: \
          the time (seconds since 1970), the request's id, its origin, the operation, offset, length, \
          flags (`-` for none), the result (`ok`, or `errno=` and its number), the time it took, and for \
          an error what it says.\n\n\
          \x20   1795190400.000123 17 guest write 4096 512 fua ok 85.3us\n\n\
          To see what a guest does, or what an element makes of it: put one above and one below.\n\n\
          A line costs a system call, about 3 us for a file; a log on a disk or terminal that stalls stalls \
          the requests too. What cannot be written is lost, said once and counted; requests never fail \
          for it. Several elements may share a file.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "paused", access: Access::ReadWrite, doc: "yes while nothing is written" },
        Handler { name: "lost", access: Access::Read, doc: "lines that could not be written" },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:debug_log.sock)\n\
              element MyDebug (type debug_log) (logfile request.log)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> MyDebug -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(DebugLog::open(&build.read(Params::from)?)?)),
    ..ElementType::BASE
};

struct DebugLog {
    log: File,
    lost: AtomicU64,
    paused: AtomicBool,
}

impl DebugLog {
    fn open(params: &Params) -> Result<DebugLog> {
        let log = match &params.logfile {
            None => std::io::stderr().as_fd().try_clone_to_owned().map(File::from),
            Some(path) => File::options().append(true).create(true).open(path),
        };
        let log = log.map_err(|error| {
            let error = Error::io(error, "the log cannot be opened");
            params.logfile.iter().fold(error, |error, path| error.with_path(path))
        })?;
        Ok(DebugLog { log, lost: AtomicU64::new(0), paused: AtomicBool::new(params.paused) })
    }

    /// Writes a line at once: when a reply is sent, its line is in the file.
    fn write(&self, line: &str) {
        // With O_APPEND one call adds one whole line, whoever else writes to the file.
        let Err(error) = (&self.log).write_all(line.as_bytes()) else { return };
        if self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("a log of requests loses lines: {error}");
        }
    }
}

/// The columns of a line that follow from the request.
struct Asked {
    id: u64,
    origin: Origin,
    op: Op,
    offset: u64,
    len: u64,
    flags: Flags,
}

impl Asked {
    fn line(&self, at: SystemTime, took: Duration, reply: &Reply) -> String {
        let Asked { id, origin, op, offset, len, flags } = self;
        let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (seconds, micros) = (at.as_secs(), at.subsec_micros());
        let took = took.as_nanos() as f64 / 1000.0;
        let asked = format_args!("{seconds}.{micros:06} {id} {origin} {op} {offset} {len} {flags:?}");
        match reply {
            Ok(_) => format!("{asked} ok {took:.1}us\n"),
            // Quoted, so that no text can make two lines of one.
            Err(error) => {
                let errno = error.errno().raw_os_error();
                format!("{asked} errno={errno} {took:.1}us {:?}\n", error.to_string())
            }
        }
    }
}

impl Element for DebugLog {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if self.paused.load(Ordering::Relaxed) {
            return cx.forward(0, req);
        }
        let Request { id, origin, op, offset, len, flags, .. } = req;
        let asked = Asked { id, origin, op, offset, len, flags };
        let since = cx.now();
        cx.forward(0, req).then(move |reply| {
            self.write(&asked.line(rt::wall_clock(), cx.now() - since, &reply));
            reply
        })
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "paused" => Ok(if self.paused.load(Ordering::Relaxed) { "yes" } else { "no" }.to_owned()),
            "lost" => Ok(self.lost.load(Ordering::Relaxed).to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        match (handler, value) {
            ("paused", "yes" | "no") => self.paused.store(value == "yes", Ordering::Relaxed),
            ("paused", _) => return Err(Error::invalid(format!("expected yes or no, found `{value:.40}`"))),
            _ => return Err(Error::no_handler(handler)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::testing::CATALOGUE;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Data, Kind};

    fn over(logfile: &str, below: &str) -> String {
        format!("element D (type debug.log) (logfile {logfile}) element B {below} D -> B")
    }

    #[test]
    fn the_line_is_in_the_file_when_the_reply_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("request.log");
        run(1, async |host| {
            let text = over(&path.display().to_string(), "(type broken) (after 2ms)");
            let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
            let mut write = Request::write(100, Data::zeros(5)).with(Flags::FUA);
            write.origin = Origin::Copy;
            for lines in 1..4 {
                disk.submit(write.clone()).await.unwrap_err();
                let log = std::fs::read_to_string(&path).unwrap();
                assert_eq!(log.lines().count(), lines);
                let line = log.lines().last().unwrap();
                let (time, rest) = line.split_once(' ').unwrap();
                assert!(time.parse::<f64>().unwrap() > 1.7e9, "{line}");
                let wanted = format!(
                    "{lines} copy write 100 5 fua errno=5 2000.0us \"B: write at 100: broken on purpose\""
                );
                assert_eq!(rest, wanted);
            }
        });
    }

    #[test]
    fn nothing_is_written_while_it_is_paused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("request.log");
        run(1, async |host| {
            let logfile = format!("(logfile {}) (paused yes)", path.display());
            let text = format!("element D (type debug_log) {logfile} element M (type mem) (size 1k) D -> M");
            let made = graph(&host, crate::ALL, &text, "D").unwrap();
            let paused =
                made.instances().find(|instance| instance.name == "D").unwrap().element.get("paused");
            assert_eq!(paused.unwrap(), "yes");
            let element = made.instances().find(|instance| instance.name == "D").unwrap().element.clone();
            let disk = TestDisk::serve(&host, made).await;
            let lines = || std::fs::read_to_string(&path).unwrap().lines().count();
            for (paused, wanted) in [("yes", 0), ("no", 1), ("yes", 1), ("no", 2)] {
                element.set("paused", paused).unwrap();
                assert_eq!(element.get("paused").unwrap(), paused);
                disk.op(Op::Flush, 0, 0).await.unwrap();
                assert_eq!(lines(), wanted);
            }
            assert!(element.set("paused", "maybe").is_err() && element.set("lost", "1").is_err());
        });
    }

    #[test]
    fn behaves_like_a_vector_and_appends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("request.log");
        std::fs::write(&path, "before\n").unwrap();
        run(1, async |host| {
            let text = over(&path.display().to_string(), "(type mem) (size 33001)");
            let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            play_against_model(&disk, 1, 300).await;
        });
        let log = std::fs::read_to_string(&path).unwrap();
        assert!(log.starts_with("before\n"));
        assert!(log.lines().count() > 300 && log.contains(" guest flush 0 0 - ok "), "{log}");
        assert!(Op::ALL.iter().all(|op| log.contains(&format!(" {op} "))));
    }

    #[test]
    fn a_full_log_costs_lines_and_no_request() {
        run(1, async |host| {
            let made = graph(&host, crate::ALL, &over("/dev/full", "(type mem) (size 1k)"), "D").unwrap();
            let element = made.instances().find(|instance| instance.name == "D").unwrap().element.clone();
            let disk = TestDisk::serve(&host, made).await;
            disk.write(0, b"abc").await.unwrap();
            assert_eq!(disk.read(0, 3).await.unwrap(), b"abc");
            assert_eq!(element.get("lost").unwrap(), "2");
            assert!(element.get("found").is_err());
        });
    }

    #[test]
    fn a_text_cannot_make_a_second_line() {
        let asked =
            Asked { id: 1, origin: Origin::Guest, op: Op::Read, offset: 0, len: 0, flags: Flags::NONE };
        let line = asked.line(SystemTime::UNIX_EPOCH, Duration::ZERO, &Err(Error::invalid("a\nb")));
        assert_eq!(line, "0.000000 1 guest read 0 0 - errno=22 0.0us \"a\\nb\"\n");
    }

    #[test]
    fn a_log_that_cannot_be_opened() {
        run(1, async |host| {
            let text = over("/nowhere/request.log", "(type mem) (size 1k)");
            let error = TestDisk::new(&host, crate::ALL, &text, "D").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(error.to_string().contains("/nowhere/request.log: the log cannot be opened"), "{error}");
        });
    }

    #[test]
    fn stderr_without_a_file() {
        run(1, async |host| {
            let text = "element D (type debug_log) element M (type mem) (size 1k) D -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "D").await.unwrap();
            disk.op(Op::Flush, 0, 0).await.unwrap();
        });
    }
}
