//! The element of docs/elements.md, compiled and tested; the guide shows this file from here on:
// guide
//! Remembers the longest request that went by.

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::Size;
use blockmason::{Cx, Element, Error, Flow, Request, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

blockmason::params! {
    /// Remembers the longest request.
    pub struct Params {
        /// Requests up to this length are not looked at.
        from: Size = "0",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "longest",
    summary: "remembers the longest request that went by",
    doc: "Passes everything on as it is. For finding out how large requests a guest makes.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[Handler { name: "bytes", access: Access::Read, doc: "length of the longest request" }],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:longest.sock)\n\
              element Longest (type longest) (from 4k)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Longest -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        Ok(Arc::new(Longest { from: params.from.0, bytes: AtomicU64::new(0) }))
    },
    ..ElementType::BASE
};

struct Longest {
    from: u64,
    bytes: AtomicU64,
}

impl Element for Longest {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.len > self.from {
            self.bytes.fetch_max(req.len, Ordering::Relaxed);
        }
        cx.forward(0, req)
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "bytes" => Ok(self.bytes.load(Ordering::Relaxed).to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[test]
fn the_longest_request_is_remembered() {
    use blockmason::testing::{TestDisk, run};
    static TYPES: &[&ElementType] = &[&TYPE, &blockmason_elements::sink::mem::TYPE];
    run(1, async |host| {
        let graph = "element L (type longest) (from 9) element M (type mem) (size 1M) L -> M";
        let disk = TestDisk::new(&host, TYPES, graph, "L").await.unwrap();
        for len in [7, 4096, 512] {
            disk.read(0, len).await.unwrap();
        }
        let found = disk.disk.graph().instances().find(|instance| instance.name == "L").unwrap().clone();
        assert_eq!(found.element.get("bytes").unwrap(), "4096");
    });
}
// end of the guide

#[test]
fn the_guide_shows_this_file() {
    let own = include_str!("guide.rs");
    let guide = include_str!("../../docs/elements.md");
    let shown = own.split("// guide\n").nth(1).unwrap().split("// end of the guide\n").next().unwrap();
    assert!(guide.contains(shown), "docs/elements.md shows another element than this file");
    let lines = shown.split("#[test]").next().unwrap().lines().filter(|line| !line.is_empty()).count();
    assert!(lines < 60, "{lines} lines");
}
