//! What each chore runs.
//!
//! Target directories: the workspace's own for everything ordinary; `loom` below it, because the models are
//! built with another `cfg`; `fuzz` below it, because fuzzing is a workspace of its own.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{mem, thread};

/// The first command of the README, behind `sh -c`.
const PIPELINE: &str = "seq 3000000 | sort -r -S 1G | md5sum";

/// How long a step may take where nobody watches, unless it says otherwise.
const MINUTES: u64 = 8;
/// The same for the tests, which have watchdogs of their own far below.
const TEST_MINUTES: u64 = 28;

/// One command, and how it is judged.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    program: &'static str,
    arguments: Vec<String>,
    variables: Vec<(&'static str, OsString)>,
    judge: Judge,
    minutes: u64,
}

enum Judge {
    /// By its exit code.
    Exit,
    /// By its output as well, which must be that of [`PIPELINE`] run by itself.
    SameAsPlain,
}

/// How a step ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Passed,
    /// Why, and the part of what it printed that says more; empty where it was printed to a terminal.
    Failed(String, Vec<String>),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed(why, _) => write!(f, "FAILED ({why})"),
        }
    }
}

impl Step {
    fn cargo(name: &'static str, arguments: &str) -> Self {
        Self {
            name,
            program: "cargo",
            arguments: arguments.split_whitespace().map(str::to_owned).collect(),
            variables: Vec::new(),
            judge: Judge::Exit,
            minutes: MINUTES,
        }
    }

    fn with(mut self, variable: &'static str, value: impl Into<OsString>) -> Self {
        self.variables.push((variable, value.into()));
        self
    }

    fn and(mut self, more: &[String]) -> Self {
        self.arguments.extend_from_slice(more);
        self
    }

    /// What to type to run it by hand.
    pub(crate) fn line(&self) -> String {
        let quote = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,".contains(c);
            if text.chars().all(plain) { text.to_owned() } else { format!("'{text}'") }
        };
        let variables =
            self.variables.iter().map(|(name, value)| format!("{name}={}", quote(&value.to_string_lossy())));
        let words =
            std::iter::once(self.program.to_owned()).chain(self.arguments.iter().map(|word| quote(word)));
        variables.chain(words).collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn run(&self, root: &Path) -> Outcome {
        let mut command = Command::new(self.program);
        command.args(&self.arguments).envs(self.variables.clone()).current_dir(root).stdin(Stdio::null());
        let done = match self.judge {
            Judge::Exit => self.carry_out(command),
            // A line fits into the pipe: it is read when the command has ended.
            Judge::SameAsPlain => self.carry_out_captured(command),
        };
        done.unwrap_or_else(|error| Outcome::Failed(format!("{}: {error}", self.program), Vec::new()))
    }

    fn carry_out(&self, mut command: Command) -> io::Result<Outcome> {
        if is_watched() {
            return Ok(judge(start(&mut command)?.wait().map(Some)?, self.minutes, Vec::new()));
        }
        // One pipe for both streams, so that their lines stay in order.
        let (output, input) = io::pipe()?;
        command.stdout(input.try_clone()?).stderr(input);
        let mut child = start(&mut command)?;
        // The command holds the pipe's other end; with it gone, the reader ends with the child.
        drop(command);
        let (sender, told) = mpsc::channel();
        thread::spawn(move || sender.send(pass_on(BufReader::new(output))));
        let status = wait(&mut child, self.minutes)?;
        // A process that outlived the command may hold the pipe open.
        let told = told.recv_timeout(Duration::from_secs(10)).unwrap_or_default();
        Ok(judge(status, self.minutes, told))
    }

    fn carry_out_captured(&self, mut command: Command) -> io::Result<Outcome> {
        let mut child = start(command.stdout(Stdio::piped()))?;
        let status = wait(&mut child, self.minutes)?;
        let outcome = judge(status, self.minutes, Vec::new());
        if outcome != Outcome::Passed {
            return Ok(outcome);
        }
        let mut managed = String::new();
        if let Some(mut output) = child.stdout.take() {
            output.read_to_string(&mut managed)?;
        }
        let plain = Command::new("sh").args(["-c", PIPELINE]).stdin(Stdio::null()).output()?.stdout;
        let plain = String::from_utf8_lossy(&plain);
        print!("with uhmm     {managed}without uhmm  {plain}");
        if managed == plain {
            Ok(Outcome::Passed)
        } else {
            Ok(Outcome::Failed("the output differs".to_owned(), Vec::new()))
        }
    }
}

fn judge(status: Option<ExitStatus>, minutes: u64, told: Vec<String>) -> Outcome {
    match status {
        Some(status) if status.success() => Outcome::Passed,
        Some(status) => Outcome::Failed(status.to_string(), told),
        None => Outcome::Failed(format!("not done after {minutes} minutes"), told),
    }
}

/// Prints every line as it comes. Returns those from the first failure a test runner reports to the end of
/// its report; without one, the last lines.
fn pass_on(mut lines: impl BufRead) -> Vec<String> {
    const MOST: usize = 120;
    let (mut told, mut reported, mut line) = (Vec::new(), false, Vec::new());
    // The line may not be UTF-8: the output of a program under test.
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&mem::take(&mut line)).into_owned();
        print!("{text}");
        let _ = io::stdout().flush();
        if text.trim_end() == "failures:" && !reported {
            reported = true;
            told.clear();
        }
        if told.len() == MOST && !reported {
            told.remove(0);
        }
        if told.len() < MOST {
            told.push(text);
        }
    }
    told
}

fn is_watched() -> bool {
    std::env::var_os("CI").is_none()
}

fn start(command: &mut Command) -> io::Result<Child> {
    // A group of its own, so that everything that hangs can be ended; at a terminal, ^C does that.
    if is_watched() { command.spawn() } else { command.process_group(0).spawn() }
}

/// Waits for the end; where nobody watches, to the deadline.
fn wait(child: &mut Child, minutes: u64) -> io::Result<Option<ExitStatus>> {
    if is_watched() {
        return child.wait().map(Some);
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60 * minutes) {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let group = format!("-{}", child.id());
    Command::new("sh").args(["-c", "kill -KILL -- \"$0\"", &group]).status()?;
    child.wait().map(|_| None)
}

/// A directory below the workspace's target directory.
pub(crate) fn below_target(name: &str) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::root().join("target"), PathBuf::from)
        .join(name)
}

pub(crate) fn ci() -> Vec<Step> {
    let mut all = fmt(&["--check".to_owned()]);
    all.extend(lint());
    all.extend(test());
    all.extend(loom());
    all.extend(fuzz_smoke(&[]));
    all.extend(conformance());
    all.extend(bench_smoke());
    all.extend(first_run());
    all
}

pub(crate) fn fmt(more: &[String]) -> Vec<Step> {
    vec![
        Step::cargo("fmt", "fmt --all").and(more),
        Step::cargo("fmt-fuzz", "fmt --manifest-path fuzz/Cargo.toml").and(more),
    ]
}

pub(crate) fn lint() -> Vec<Step> {
    vec![
        Step::cargo("clippy", "clippy --workspace --all-targets -- -D warnings"),
        Step::cargo("clippy-fuzz", "clippy --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings")
            .with("CARGO_TARGET_DIR", below_target("fuzz")),
        Step::cargo("doc", "doc --workspace --no-deps").with("RUSTDOCFLAGS", "-D warnings"),
    ]
}

pub(crate) fn test() -> Vec<Step> {
    // Where these run, userfaultfd must be there: a test that skips for want of it fails.
    let mut step = Step::cargo("test", "test --workspace")
        .with("UHMM_REQUIRE_UFFD", "1")
        .with("UHMM_REQUIRE_PROGRAMS", "1");
    step.minutes = TEST_MINUTES;
    vec![step]
}

pub(crate) fn loom() -> Vec<Step> {
    vec![
        Step::cargo("loom", "test -p uhmm-core --release --lib loom")
            .with("RUSTFLAGS", "--cfg loom")
            .with("LOOM_MAX_PREEMPTIONS", "2")
            .with("CARGO_TARGET_DIR", below_target("loom")),
    ]
}

pub(crate) fn fuzz_smoke(more: &[String]) -> Vec<Step> {
    vec![
        Step::cargo("fuzz-smoke", "run --release --manifest-path fuzz/Cargo.toml --bin smoke --")
            .and(more)
            .with("CARGO_TARGET_DIR", below_target("fuzz")),
    ]
}

pub(crate) fn conformance() -> Vec<Step> {
    let mut hmm_tests = Step::cargo("hmm-tests", "xtask hmm-tests");
    // The package that their source comes in is large.
    hmm_tests.minutes = TEST_MINUTES;
    vec![
        Step::cargo("devices", "test -p uhmm-devices --test suite"),
        Step::cargo("sim-host", "test -p uhmm-testdev --tests"),
        Step::cargo("linux-host", "test -p uhmm-sys --lib -- host:: uffd::"),
        hmm_tests,
        Step::cargo("hmm-fallback", "xtask hmm-tests --fallback"),
    ]
}

pub(crate) fn bench_smoke() -> Vec<Step> {
    vec![Step::cargo("bench", "run --release -- bench --quick")]
}

pub(crate) fn man() -> Vec<Step> {
    let mut step = Step::cargo("man", "run -- man");
    step.arguments.push(below_target("man").to_string_lossy().into_owned());
    vec![step]
}

pub(crate) fn first_run() -> Vec<Step> {
    let mut step = Step::cargo("first-run", "run --release -- run --ram 64MiB -- sh -c");
    step.arguments.push(PIPELINE.to_owned());
    step.judge = Judge::SameAsPlain;
    vec![step]
}
