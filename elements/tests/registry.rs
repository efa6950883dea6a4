//! Walks the table of element types and says what is missing: documentation, an example that checks and
//! runs, tests, the right place in the source tree. Whatever is in the table is covered.
#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "kit/buckets.rs"]
mod buckets;

use blockmason::describe::{ElementType, Family, Survives};
use blockmason::graph::build::Builder;
use blockmason::lang::{Defines, check, parse_str};
use blockmason::sched::HostConfig;
use blockmason::{Disk, Host, Request};
use blockmason_elements::ALL;
use blockmason_elements::parallax::tool::{self, Operation, Settings};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// All that is wrong, for one message at the end.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn unless(&mut self, good: bool, fault: impl FnOnce() -> String) {
        if !good {
            self.0.push(fault());
        }
    }

    fn assert_none(self) {
        assert!(self.0.is_empty(), "\n{}", self.0.join("\n"));
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn one_line(text: &str) -> bool {
    !text.trim().is_empty() && !text.contains('\n')
}

#[test]
fn every_type_and_all_of_it_is_documented() {
    let mut faults = Faults::default();
    for ty in ALL {
        let name = ty.name;
        faults.unless(is_name(name), || format!("{name}: a name is lower case"));
        faults.unless(one_line(ty.summary) && !ty.summary.ends_with('.'), || {
            format!("{name}: the summary is one line without a full stop: {:?}", ty.summary)
        });
        faults.unless(ty.doc.len() > ty.summary.len(), || format!("{name}: no doc worth the name"));
        for param in ty.params {
            let doc = !param.doc.trim().is_empty() && !param.kind.is_empty();
            faults.unless(doc, || format!("{name}: parameter {} has no doc", param.name));
            faults.unless(param.name != "type" && is_name(param.name), || {
                format!("{name}: parameter {} is not named well", param.name)
            });
        }
        for handler in ty.handlers {
            faults.unless(one_line(handler.doc), || format!("{name}: handler {} has no doc", handler.name));
            faults.unless(is_name(handler.name), || format!("{name}: handler {} in capitals", handler.name));
        }
    }
    faults.assert_none();
}

#[test]
fn no_name_is_used_twice() {
    let mut faults = Faults::default();
    let mut types = BTreeSet::new();
    for ty in ALL {
        faults.unless(types.insert(ty.name), || format!("two types {}", ty.name));
        let mut names = BTreeSet::new();
        for name in ty.params.iter().map(|param| param.name) {
            faults.unless(names.insert(name), || format!("{}: two parameters {name}", ty.name));
        }
        names.clear();
        for name in ty.handlers.iter().map(|handler| handler.name) {
            faults.unless(names.insert(name), || format!("{}: two handlers {name}", ty.name));
        }
    }
    faults.assert_none();
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The source of a type: one file of its name in the folder of its family, or a folder with several.
fn source_of(ty: &ElementType) -> Option<String> {
    let place = source().join(ty.family.name()).join(ty.name);
    // A file, a folder, or a file whose tests are in a folder.
    let own = place.with_extension("rs");
    let entries = std::fs::read_dir(place).into_iter().flatten().map(|entry| entry.unwrap().path());
    let files = entries.chain(own.exists().then_some(own));
    let rust: Vec<_> = files.filter(|path| path.extension().is_some_and(|ext| ext == "rs")).collect();
    let text: String = rust.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    (!text.is_empty()).then_some(text)
}

#[test]
fn every_type_has_tests_and_stands_where_its_name_says() {
    let mut faults = Faults::default();
    for ty in ALL {
        let (name, folder) = (ty.name, ty.family.name());
        let Some(text) = source_of(ty) else {
            faults.unless(false, || format!("{name}: there is no src/{folder}/{name}.rs"));
            continue;
        };
        faults.unless(text.contains(&format!("name: \"{name}\"")), || {
            format!("{name}: src/{folder}/{name}.rs declares another type")
        });
        faults.unless(text.contains("mod tests") && text.contains("#[test]"), || {
            format!("{name}: no tests beside the code")
        });
    }
    faults.assert_none();
}

#[test]
fn every_type_in_the_source_is_in_the_table() {
    let mut faults = Faults::default();
    let families = [
        Family::Export,
        Family::Sink,
        Family::Route,
        Family::Transform,
        Family::Migrate,
        Family::Parallax,
        Family::Fault,
    ];
    for folder in families.map(Family::name) {
        // A family may have no element yet.
        let Ok(entries) = std::fs::read_dir(source().join(folder)) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let file = if path.is_dir() { path.join("mod.rs") } else { path.clone() };
            let name = path.file_stem().unwrap().to_str().unwrap();
            // A folder of tests, or of what an element is made of.
            let Ok(text) = std::fs::read_to_string(&file) else { continue };
            let declares = text.contains("pub const TYPE: ElementType");
            let known = ALL.iter().any(|ty| ty.name == name && ty.family.name() == folder);
            faults.unless(!declares || known, || format!("{}: not in the table", file.display()));
        }
    }
    faults.assert_none();
}

/// What a graph that reaches for `far.sock` finds there.
const FAR: &str = "
    element Far (type nbd) (listen unix:far.sock) (name vm1)
    element Memory (type mem) (size 1M)
    Far -> Memory
";

/// A pool with a volume.
fn make_pool(path: &Path, volume: &str, size: u64) {
    tool::create(path, Some(64 << 20)).unwrap();
    let made = Operation::CreateVolume { name: volume.to_owned(), size, settings: Settings::default() };
    tool::open(path).unwrap().carry_out(&made).unwrap();
}

/// Serves a graph in an empty folder; where it needs a server, there is one.
async fn serve(name: &str, text: &str) -> blockmason::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    if text.contains("(pool vms.pool)") {
        make_pool(&folder.path().join("vms.pool"), "vm1", 1 << 20);
    }
    if text.contains("(key_file vm1.key)") {
        std::fs::write(folder.path().join("vm1.key"), [7; 32]).unwrap();
    }
    if text.contains("(type s3)") {
        let server = mason_bucket::Server::new();
        let near = buckets::volume(&server, &folder, 8 << 20);
        let text = text.replace("(endpoint http://127.0.0.1:9000)", &near);
        return serve_in(&folder, name, &text, async || Ok(())).await;
    }
    if !text.contains("far.sock") {
        return serve_in(&folder, name, text, async || Ok(())).await;
    }
    serve_in(&folder, "far", FAR, async || serve_in(&folder, name, text, async || Ok(())).await).await
}

/// Builds a graph, serves a read to each of its exports, does something meanwhile, and stops it.
async fn serve_in(
    folder: &tempfile::TempDir,
    name: &str,
    text: &str,
    meanwhile: impl AsyncFnOnce() -> blockmason::Result<()>,
) -> blockmason::Result<()> {
    let state = folder.path().join("state");
    std::fs::create_dir_all(&state).unwrap();
    let invalid = |diagnostics: blockmason::lang::Diagnostics| {
        blockmason::Error::invalid(diagnostics.render(blockmason::lang::Style::Plain, 100))
    };
    let spec = parse_str(name, text, folder.path(), &Defines::new()).map_err(invalid)?;
    check(&spec, ALL).map_err(invalid)?;
    let host = Host::start(HostConfig { shards: 1, ..HostConfig::new(&state) })?;
    let builder = Builder { catalogue: ALL, name, state_dir: &state, shards: host.shards() };
    let graph = Arc::new(builder.build(&spec)?);
    let disk = Disk::serve(&host, graph.clone()).await?;
    let exports: Vec<_> = graph
        .instances()
        .filter(|instance| instance.ty.family == Family::Export)
        .map(|instance| graph.node(&instance.name).unwrap())
        .collect();
    for export in exports {
        let data = host.submit(&graph, export, 0, Request::read(0, 512)).await?.into_data()?;
        assert_eq!(data.len(), 512);
        host.submit(&graph, export, 0, Request::flush()).await?;
    }
    let done = Box::pin(meanwhile()).await;
    drop(graph);
    disk.stop().await.and(done)
}

/// A graph that hangs is one that fails.
fn run(name: &str, text: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let served = runtime.block_on(blockmason::rt::timeout(Duration::from_secs(20), serve(name, text)));
    match served {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) => Err(format!("{name}: {error}")),
        None => Err(format!("{name}: not done within 20 seconds")),
    }
}

#[test]
fn every_example_checks_and_serves() {
    let mut faults = Faults::default();
    for ty in ALL {
        let shows = ty.example.contains(&format!("(type {})", ty.name));
        faults.unless(shows, || format!("{}: its example does not show it", ty.name));
        if let Err(fault) = run(ty.name, ty.example) {
            faults.unless(false, || fault);
        }
    }
    faults.assert_none();
}

#[test]
fn graphs_of_overlays_check_and_serve() {
    run("cow", include_str!("../../graphs/cow.mason")).unwrap();
}

#[test]
fn graphs_of_buckets_check_and_serve() {
    run("cloud", include_str!("../../graphs/cloud.mason")).unwrap();
}

#[test]
fn graphs_that_need_no_client_check_and_serve() {
    run("faulty", include_str!("../../graphs/faulty.mason")).unwrap();
    run("notify", include_str!("../../graphs/notify.mason")).unwrap();
    run("wal", include_str!("../../graphs/wal.mason")).unwrap();
    run("powerloss", include_str!("../../graphs/powerloss.mason")).unwrap();
}

#[test]
fn graphs_of_moves_check_and_serve() {
    run("migrate", include_str!("../../graphs/migrate.mason")).unwrap();
    let compound = include_str!("../../graphs/lib/migrate.mason");
    let moving = include_str!("../../graphs/moving.mason");
    run("moving", &moving.replace("include \"lib/migrate.mason\"", compound)).unwrap();
}

/// Whoever keeps data in memory says so before another process goes on without it.
#[test]
fn what_does_not_survive_is_not_handed_over() {
    let mut faults = Faults::default();
    for ty in ALL.iter().filter(|ty| ty.survives == Survives::Nothing && ty.name != "null") {
        let folder = tempfile::tempdir().unwrap();
        let spec = parse_str(ty.name, ty.example, folder.path(), &Defines::new()).unwrap();
        let builder = Builder { catalogue: ALL, name: ty.name, state_dir: folder.path(), shards: 1 };
        let graph = builder.build(&spec).unwrap();
        let own = graph.instances().find(|instance| instance.ty.name == ty.name).unwrap();
        faults.unless(own.element.may_hand_over().is_err(), || format!("{}: it would be lost", ty.name));
    }
    faults.assert_none();
}
