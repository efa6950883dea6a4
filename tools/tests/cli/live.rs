//! `docs/live.md`, `docs/migrate.md`, `docs/backup.md`, `docs/parallax.md` and `docs/cloud.md` are sessions: the console blocks of each run in
//! order, in one shell and one fresh folder, and print what stands there.
//!
//! What differs from run to run is masked on both sides, and nothing else ([`masked`]).

use crate::harness::{Home, MASON, repository};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// What stands for the fresh folder in the document.
const FOLDER: &str = "/srv/vm";

/// What stands for a server of buckets.
const STORE: &str = "https://s3.example.org";

/// A line of its own that ends a command's output.
const MARK: &str = "--- the command has ended";

/// A command that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command of a console block, with the output that stands below it.
struct Step {
    line: usize,
    command: String,
    output: Vec<String>,
}

/// The commands of all console blocks. `$ ` begins one, `> ` goes on with it.
fn steps(text: &str) -> Vec<Step> {
    let (mut steps, mut inside) = (Vec::<Step>::new(), false);
    for (number, line) in text.lines().enumerate() {
        if let Some(fence) = line.strip_prefix("```") {
            inside = fence == "console";
        } else if let (true, Some(command)) = (inside, line.strip_prefix("$ ")) {
            steps.push(Step { line: number + 1, command: command.to_owned(), output: Vec::new() });
        } else if inside {
            let step = steps.last_mut().unwrap_or_else(|| panic!("line {}: output of nothing", number + 1));
            match line.strip_prefix("> ") {
                Some(more) if step.output.is_empty() => step.command += &format!("\n{more}"),
                _ => step.output.push(line.to_owned()),
            }
        }
    }
    steps
}

/// One shell for all commands, with stdout and stderr in the order in which they come.
struct Shell {
    child: Child,
    lines: Receiver<String>,
}

impl Shell {
    fn start(home: &Home, server: Option<&mason_bucket::Server>) -> Shell {
        let (read, write) = std::io::pipe().unwrap();
        let programs = Path::new(MASON).parent().unwrap().display();
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap());
        let mut command = home.command("bash", &["--norc"]);
        let errors = write.try_clone().unwrap();
        command.env("PATH", &path).stdin(Stdio::piped()).stdout(write).stderr(errors);
        if let Some(server) = server {
            command.env("AWS_ACCESS_KEY_ID", server.access()).env("AWS_SECRET_ACCESS_KEY", server.secret());
        }
        // Whatever becomes of the test, what runs in the background ends with the shell.
        let mut child = command.spawn().unwrap();
        drop(command);
        let trap = b"trap 'kill -9 $(jobs -p) 2> /dev/null' EXIT\n";
        child.stdin.as_mut().unwrap().write_all(trap).unwrap();
        let (send, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(read).lines().map_while(Result::ok).all(|line| send.send(line).is_ok())
        });
        Shell { child, lines }
    }

    /// What a command prints. That of one in the background is waited for, as far as it is expected.
    fn run(&mut self, step: &Step) -> Vec<String> {
        let background = step.command.ends_with('&');
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{}\necho; echo '{MARK}'\n", step.command).as_bytes()).unwrap();
        let (mut output, mut marked) = (Vec::new(), false);
        while !marked || (background && output.len() < step.output.len()) {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line == MARK => marked = true,
                // The mark begins a line of its own: before it stands the line end of `echo`.
                Ok(line) if line.is_empty() && background => {}
                Ok(line) => output.push(line),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("line {}: `{}` does not end: {output:#?}", step.line, step.command)
                }
            }
        }
        if !background {
            assert_eq!(output.pop().as_deref(), Some(""), "line {}", step.line);
        }
        output
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // With its standard input it ends, and its trap ends the rest.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Commands whose output is measurements: every number of it is masked, and columns are as wide as they are.
const MEASUREMENTS: [&str; 10] = [
    "mason top",
    "mason status",
    "mason get Probe",
    "mason events",
    "mason migrate",
    "mason bucket backup",
    "mason bucket points",
    "mason bucket prune",
    "mason bucket restore",
    "mason bill",
];

/// A slow machine takes long enough for `mason migrate` to say how far it is.
fn is_progress(line: &str) -> bool {
    ["copying ", "verifying ", "cutting "].iter().any(|state| line.starts_with(state))
}

/// A line without what differs from run to run: numbers before a unit of time, of requests and bytes in
/// brackets, after `#`, ` at ` and `process `, process numbers of handovers, and names of volumes and of
/// files in the folder for state. In `measurements` all numbers.
fn masked(line: &str, measurements: bool) -> String {
    if measurements {
        let words = line.split_whitespace().map(|word| if word == "-" { "#" } else { word });
        return words.map(|word| mask(word, |_, _| true)).collect::<Vec<_>>().join(" ");
    }
    let mut brackets = 0;
    let mut parts = Vec::new();
    for part in line.split_inclusive(['[', ']']) {
        let counts = brackets > 0 && part.contains(" requests, ");
        let is_varying = |before: &str, number: &str| {
            let time = ["ns", "us", "ms", "s"].iter().any(|unit| {
                number.strip_suffix(unit).is_some_and(|digits| digits.ends_with(|c: char| c.is_ascii_digit()))
            });
            let volume = is_id(number);
            let place =
                ["#", " at ", "process ", "handed over from "].iter().any(|word| before.ends_with(word))
                    || before.ends_with("handed over from # to ");
            counts || time || volume || place
        };
        parts.push(mask(part, is_varying));
        brackets = usize::from(part.ends_with('['));
    }
    parts.concat()
}

/// Puts `#` in the place of words with digits that vary. `varies` gets what stands before a word, too.
fn mask(text: &str, varies: impl Fn(&str, &str) -> bool) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '~' | '_');
    let (mut out, mut rest) = (String::new(), text);
    while let Some(start) = rest.find(is_word) {
        out += &rest[..start];
        let word = &rest[start..];
        let word = &word[..word.find(|c| !is_word(c)).unwrap_or(word.len())];
        let numeric = word.starts_with(|c: char| c.is_ascii_digit() || c == '~') || is_id(word);
        out += if numeric && varies(&out, word) { "#" } else { word };
        rest = &rest[start + word.len()..];
    }
    out + rest
}

/// The name of a volume, or what a file in the folder for state is called by.
fn is_id(word: &str) -> bool {
    matches!(word.len(), 16 | 32) && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn needs(program: &str) {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    assert!(found.is_ok(), "{program} cannot be started: tests/run installs it");
}

#[test]
fn the_session_of_live_md_is_what_happens() {
    play("docs/live.md");
}

#[test]
fn the_session_of_migrate_md_is_what_happens() {
    play("docs/migrate.md");
}

fn play(document: &str) {
    ["bash", "fio", "qemu-io"].into_iter().for_each(needs);
    session(document, 40);
}

#[test]
fn the_session_of_parallax_md_is_what_happens() {
    session("docs/parallax.md", 30);
}

/// What a table says shows something is there.
#[test]
fn the_tests_that_parallax_md_names_are_there() {
    let text = std::fs::read_to_string(repository().join("docs/parallax.md")).unwrap();
    let (_, table) = text.split_once("## What the papers describe").unwrap();
    let mut sources = String::new();
    let mut folders = ["elements", "tools"].map(|folder| repository().join(folder)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("rs") => sources += &std::fs::read_to_string(&path).unwrap(),
                _ => {}
            }
        }
    }
    let shown = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    let names: Vec<&str> =
        shown.flat_map(|line| line.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2)).collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        let there = match name.contains('/') {
            true => repository().join(name).is_file(),
            false => sources.contains(&format!("fn {name}() {{")),
        };
        assert!(there, "{name}");
    }
}

#[test]
fn the_session_of_backup_md_is_what_happens() {
    ["bash", "qemu-io", "cmp"].into_iter().for_each(needs);
    session("docs/backup.md", 15);
}

#[test]
fn the_session_of_cloud_md_is_what_happens() {
    ["bash", "qemu-io"].into_iter().for_each(needs);
    let server = mason_bucket::Server::new();
    ["vms", "backup"].into_iter().for_each(|bucket| server.store().create_bucket(bucket));
    session_with("docs/cloud.md", 15, Some(&server));
}

/// Runs a document with more than so many commands.
fn session(document: &str, least: usize) {
    session_with(document, least, None);
}

fn session_with(document: &str, least: usize, server: Option<&mason_bucket::Server>) {
    let text = std::fs::read_to_string(repository().join(document)).unwrap();
    let steps = steps(&text);
    assert!(steps.len() > least, "only {} commands", steps.len());
    let home = Home::new();
    let folder = home.path("").canonicalize().unwrap().display().to_string();
    let mut shell = Shell::start(&home, server);
    let endpoint = server.map_or_else(|| STORE.to_owned(), mason_bucket::Server::endpoint);
    for mut step in steps {
        let measurements = MEASUREMENTS.iter().any(|command| step.command.contains(command));
        step.command = step.command.replace(STORE, &endpoint);
        let step = &step;
        let mask =
            |line: &String| masked(&line.replace(&folder, FOLDER).replace(&endpoint, STORE), measurements);
        let happens: Vec<_> = shell.run(step).iter().filter(|line| !is_progress(line)).map(mask).collect();
        let stands: Vec<_> = step.output.iter().map(mask).collect();
        assert_eq!(happens, stands, "{document} line {}: {}", step.line, step.command);
    }
}

#[test]
fn masks_are_narrow() {
    let plain = |line| masked(line, false);
    assert_eq!(
        plain("done in 4.7ms, the gate was closed for 487.7us"),
        "done in #, the gate was closed for #"
    );
    assert_eq!(plain("-> A  file  size 64M  [92 requests, 368k]"), "-> A  file  size 64M  [# requests, #]");
    assert_eq!(plain("rate: 50M/s -> 40M/s"), "rate: 50M/s -> 40M/s");
    assert_eq!(plain("  2 kept"), "  2 kept");
    assert_eq!(
        plain("    -   member 1: fa53a28e4a1a74af2dfe32b4ee768e7d"),
        plain("    -   member 1: 0a53a28e4a1a74af2dfe32b4ee768e7d")
    );
    assert_eq!(plain("(A vm.mason:3:9)"), "(A vm.mason:3:9)");
    assert_eq!(plain("moving/vm1-75127451e282d489/Disk"), plain("moving/vm1-f5127451e282d489/Disk"));
    assert!(is_progress("copying 12M of 64M, 5M/s") && !is_progress("vm1 Disk: copying, 12M of 64M"));
    assert_eq!(masked("  Guest   write   201  802.6k", true), "Guest write # #");
}

/// The commands of the README's paragraph, against the graph that it means.
#[test]
fn the_commands_of_the_readme_change_the_quickstart() {
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let section =
        readme.split("\n## ").find(|section| section.starts_with("Change it while it runs")).unwrap();
    let commands: Vec<_> = section.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    assert_eq!(commands.len(), 3);
    let home = Home::new();
    let daemon = home.run(&[repository().join("graphs/quickstart.mason").to_str().unwrap()], 1);
    let path = format!("{}:{}", Path::new(MASON).parent().unwrap().display(), std::env::var("PATH").unwrap());
    for command in commands {
        let output = home.command("sh", &["-c", command]).env("PATH", &path).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "20M/s\n");
    assert!(!home.mason(&["show"]).done().contains("Probe"));
    daemon.stop().done();
}
