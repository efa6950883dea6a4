//! Who may open a pool, and a volume of it, and by what names.

use super::super::shared::{Shared, make};
use super::super::tool::{self, Operation, Settings};
use blockmason::testing::{TestDisk, graph, run};
use blockmason::{Kind, Op};
use std::path::PathBuf;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A pool with a volume `v`.
fn pool(folder: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("a.pool");
    make(&path, Some(64 * MIB), [7; 16]).unwrap();
    let made = Operation::CreateVolume { name: "v".into(), size, settings: Settings::default() };
    tool::open(&path).unwrap().carry_out(&made).unwrap();
    path
}

#[test]
fn a_pool_is_one_by_whatever_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder, MIB);
    let (hard, soft) = (folder.path().join("hard"), folder.path().join("soft"));
    std::fs::hard_link(&path, &hard).unwrap();
    std::os::unix::fs::symlink(&path, &soft).unwrap();
    let shared = Shared::open(&path, MIB).unwrap();
    for other in [hard, soft] {
        assert!(Arc::ptr_eq(&shared, &Shared::open(&other, MIB).unwrap()));
    }
}

/// Which might never answer, and would keep everybody else waiting.
#[test]
fn what_is_neither_a_file_nor_a_device_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    for path in [path, "/dev/zero".into()] {
        assert_eq!(Shared::open(&path, MIB).err().unwrap().kind(), Kind::Denied);
        assert_eq!(tool::list(&path).unwrap_err().kind(), Kind::Denied);
    }
}

/// They all open within one turn of a task, which asks others to wait for theirs after a while.
#[test]
fn a_graph_with_many_volumes_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder, MIB);
    let element = |ix: usize| {
        format!(
            "element D{ix} (type parallax) (pool {}) (volume v) element E{ix} (type delay) E{ix} -> D{ix} ",
            path.display()
        )
    };
    let text: String = (0..300).map(element).collect();
    run(1, async |host| {
        let disk = TestDisk::serve(&host, graph(&host, crate::ALL, &text, "E299").unwrap()).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        assert_eq!(disk.read(0, 4096).await.unwrap(), [1; 4096]);
    });
}

#[test]
fn what_has_changed_ends_with_the_volume() {
    let folder = tempfile::tempdir().unwrap();
    let size = 5 * MIB;
    let path = pool(&folder, size);
    let text = format!("element D (type parallax) (pool {}) (volume v)", path.display());
    run(1, async |host| {
        let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
        disk.write(0, &vec![1; size as usize]).await.unwrap();
        disk.op(Op::Flush, 0, 0).await.unwrap();
    });
    let open = tool::open(&path).unwrap();
    open.carry_out(&Operation::Snapshot { volumes: vec!["v".into()], name: "s".into() }).unwrap();
    open.carry_out(&Operation::Punch { volume: "v".into(), offset: 0, len: size, receiver: None }).unwrap();
    let diff = Operation::Diff {
        volume: "v".into(),
        until: None,
        since: Some("s".into()),
        number: None,
        since_number: None,
    };
    assert_eq!(open.carry_out(&diff).unwrap(), serde_json::json!([[0, size]]));
}

#[test]
fn a_setting_that_is_refused_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let open = tool::open(&pool(&folder, MIB)).unwrap();
    let settings =
        tool::NewSettings { ordered: Some(true), reserve: Some(1 << 60), ..tool::NewSettings::default() };
    let refused = open.carry_out(&Operation::Set { name: "v".into(), settings }).unwrap_err();
    assert_eq!(refused.kind(), Kind::NoSpace);
    let list = open.carry_out(&Operation::List).unwrap();
    assert_eq!(list["volumes"][0]["ordered"], false);
}
