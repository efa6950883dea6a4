//! A window: part of a disk as a disk of its own.

use blockmason::describe::{Build, ElementType, Family, Ports};
use blockmason::lang::value::Size;
use blockmason::sched::Part;
use blockmason::{Children, Cx, Element, Error, Flow, Geometry, Op, Prepared, Request, Result};
use std::sync::Arc;

blockmason::params! {
    /// A window.
    pub struct Slice {
        /// Where the window begins on the disk below.
        offset: Size = "0",
        /// Its size. Without it the window reaches to the end of the disk.
        length: Option<Size>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "slice",
    summary: "shows part of a disk as a disk of its own",
    doc: "Byte 0 above is byte `offset` below; nothing outside the window can be reached. For a partition, \
          or for several small disks on one large one.\n\n\
          A graph in which the window does not lie within the disk is refused. Requests go on moved and \
          otherwise as they are; a flush, FUA and errors are those of the disk below, so a flush covers \
          the whole of it.\n\n\
          `offset` and `length` are the layout: the bytes make sense only with the same ones.",
    family: Family::Route,
    params: Slice::PARAMS,
    ports: Ports::THROUGH,
    layout: true,
    example: "element Guest (type nbd) (listen unix:slice.sock)\n\
              element Partition (type slice) (offset 1M) (length 32M)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Partition -> Disk\n",
    check: Slice::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Slice::from)?)),
    ..ElementType::BASE
};

impl Element for Slice {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        let start = self.offset.0;
        let size = self.length.map_or(below.size.saturating_sub(start), |length| length.0);
        // Neither is above i64::MAX, so that the sum does not overflow.
        if start + size > below.size {
            let window = format!("the window from {start} to {}", start + size);
            let message = format!("{window} reaches past the end of the disk below, {}", below.size);
            return Err(Error::invalid(message));
        }
        Ok(Prepared::of(Geometry { size, ..below.above() }))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Flush | Op::Control => cx.forward(0, req),
            Op::Read | Op::Write | Op::Discard | Op::WriteZeroes | Op::Cache => {
                req.offset += self.offset.0;
                cx.forward(0, req)
            }
            // An answer may reach past the range that was asked for; here it must not pass the window.
            Op::Extents => cx.scatter(&req, [Part::new(0, req.offset + self.offset.0, req.len, 0)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::route::testing::tail_call;
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Op, Request};

    #[test]
    fn behaves_like_a_vector() {
        for (seed, window) in ["(offset 1) (length 9999)", "(offset 4k)", "(length 7)", ""].iter().enumerate()
        {
            run(seed as u64, async |host| {
                let text =
                    format!("element S (type slice) {window} element M (type mem) (size 33001) S -> M");
                let disk = TestDisk::new(&host, crate::ALL, &text, "S").await.unwrap();
                play_against_model(&disk, seed as u64, 300).await;
            });
        }
    }

    #[test]
    fn two_windows_on_one_disk() {
        run(1, async |host| {
            let text = "element L (type linear) element M (type mem) (size 100)\n\
                element A (type slice) (offset 10) (length 5) element B (type slice) (offset 95)\n\
                (L, whole) -> M (L, a) -> A -> M (L, b) -> B -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            assert_eq!(disk.size(), 110);
            disk.write(100, b"0123456789").await.unwrap();
            assert_eq!(disk.read(9, 7).await.unwrap(), b"\x0001234\0");
            assert_eq!(disk.read(94, 6).await.unwrap(), b"\x0056789");
        });
    }

    #[test]
    fn moving_is_a_tail_call() {
        let text = "element S (type slice) (offset 100) element E (type echo) S -> E";
        assert_eq!(tail_call(text, "S", Request::read(5, 10)), "read 105+10");
        assert_eq!(tail_call(text, "S", Request::flush()), "flush 0+0");
        let text = "element S (type slice) (offset 100) element M (type mem) (size 1k) S -> M";
        assert!(tail_call(text, "S", Request::new(Op::Discard, 5, 10)).starts_with("now Ok"));
    }

    #[test]
    fn extents_stay_in_the_window() {
        run(1, async |host| {
            let text = "element S (type slice) (length 4000) element N (type null) S -> N";
            let disk = TestDisk::new(&host, crate::ALL, text, "S").await.unwrap();
            assert_eq!(disk.extents(1000, 3000).await.unwrap()[0].len, 3000);
        });
    }

    #[test]
    fn a_window_that_does_not_fit() {
        run(1, async |host| {
            for window in
                ["(offset 1001)", "(length 1001)", "(offset 1) (length 1000)", "(offset 7E) (length 7E)"]
            {
                let text = format!("element S (type slice) {window} element M (type mem) (size 1000) S -> M");
                let error = TestDisk::new(&host, crate::ALL, &text, "S").await.err().unwrap().to_string();
                assert!(error.contains("1000") && error.contains("window"), "{error}");
            }
            let text = "element S (type slice) (offset 1000) element M (type mem) (size 1000) S -> M";
            assert_eq!(TestDisk::new(&host, crate::ALL, text, "S").await.unwrap().size(), 0);
        });
    }
}
