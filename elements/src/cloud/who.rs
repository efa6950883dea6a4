//! Who has opened a volume, or works on a backup: whether he still lives.

use super::format::Claim;

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Who this process is, for others.
pub(crate) fn claim() -> Claim {
    let host = read("/proc/sys/kernel/hostname").unwrap_or_default();
    let machine = read("/etc/machine-id").filter(|id| !id.is_empty()).unwrap_or_else(|| host.clone());
    let process = std::process::id();
    Claim { host, machine, process, born: born(process).unwrap_or_default(), ..Claim::default() }
}

/// What a process has that none with the same number has before or after it: the boot, and ticks since then. None if
/// there is no such process, as far as this one can see.
fn born(process: u32) -> Option<String> {
    let stat = read(&format!("/proc/{process}/stat"))?;
    // The name of the program, in parentheses, may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // One that has died stays until its parent has noticed.
    let _lives = fields.next().filter(|state| !["Z", "X", "x"].contains(state))?;
    let ticks = fields.nth(18)?;
    Some(format!("{} {ticks}", read("/proc/sys/kernel/random/boot_id")?))
}

/// True if it is known that whoever has made a claim has died: on this machine.
pub(crate) fn has_died(owner: &Claim, me: &Claim) -> bool {
    let lives = !owner.born.is_empty() && born(owner.process).as_ref() == Some(&owner.born);
    // What this very process has claimed before, it has given up.
    owner.machine == me.machine && (!lives || owner.process == me.process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_when_it_was_born() {
        let me = claim();
        assert!(has_died(&me, &me));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = child.id();
        let other = Claim { process, born: born(process).unwrap(), ..me.clone() };
        assert!(!has_died(&other, &me));
        // Another one that had its number, or has it on another machine.
        assert!(has_died(&Claim { born: me.born.clone(), ..other.clone() }, &me));
        assert!(!has_died(&Claim { machine: "elsewhere".to_owned(), ..other.clone() }, &me));
        child.kill().unwrap();
        // Nobody has waited for it yet.
        while !has_died(&other, &me) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_died(&other, &me));
    }
}
