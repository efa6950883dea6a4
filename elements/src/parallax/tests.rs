//! A pool as a whole: like a vector, and after crashes of both kinds.

mod crash;
mod damage;
mod doors;
mod faults;
mod kit;
mod lines;
mod maps;
mod opening;
mod races;
mod repair;
mod rig;
mod room;
mod schedules;
mod scrub;
mod sweep;
mod tidying;

use blockmason::testing::{TestDisk, play_against_model, run};

#[test]
fn behaves_like_a_vector() {
    for (seed, more) in [("", "(size 3M)"), ("(checksums yes)", "(size 1028k)")].iter().enumerate() {
        run(seed as u64, async |host| {
            let (checksums, size) = more;
            let text = format!(
                "element R (type radix) (volume v) {size} {checksums} element D (type mem) (size 64M) R -> D"
            );
            let disk = TestDisk::new(&host, crate::ALL, &text, "R").await.unwrap();
            play_against_model(&disk, seed as u64, 600).await;
        });
    }
}
