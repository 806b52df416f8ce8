//! Runs real programs, first as they are, then under `uhmm run` with a part of the memory they need, and
//! compares.
//!
//! What    [`Case`] is a program with its input; [`Case::squeeze`] is the whole comparison; [`finish`] runs
//!         one command to its end.
//! Limits  every command has a time limit: at its end the state of all its threads is printed and the whole
//!         tree is killed. Cases of one test binary run one after the other: each is measured alone.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

pub(crate) const MIB: u64 = 1 << 20;
/// What a program may have in RAM beyond its budget.
const SLACK: u64 = 32 * MIB;
/// Time between two looks at the memory of a program.
const LOOK: Duration = Duration::from_millis(2);

static ALONE: Mutex<()> = Mutex::new(());

/// Keeps the other tests of this binary away.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    // A test that failed says so itself.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}

/// Whether programs can be run here; else says why not.
pub(crate) fn able() -> bool {
    let doctor = Command::new(env!("CARGO_BIN_EXE_uhmm")).args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    if report["run_works"] == true {
        return true;
    }
    assert!(!required("UHMM_REQUIRE_UFFD"), "{}", report["reason"]);
    println!("skipped: {}", report["reason"]);
    false
}

/// Where a program is; else says that it is missing.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|place| place.join(name)).find(|file| file.is_file());
    if found.is_none() {
        assert!(!required("UHMM_REQUIRE_PROGRAMS"), "{name} is not installed");
        println!("skipped: {name} is not installed");
    }
    found
}

/// A directory that is gone at the end.
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Numbers that look random and are the same each time.
pub(crate) struct Numbers(pub(crate) u64);

impl Iterator for Numbers {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Some(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    /// The most anonymous memory that one of its processes was seen with.
    pub(crate) peak: u64,
    pub(crate) took: Duration,
}

impl Ended {
    /// Panics unless it ended well.
    pub(crate) fn well(self) -> Self {
        assert!(self.status.success(), "{}: {}\n{}", self.status, self.stderr, self.text());
        self
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Descendants of a process that are still its descendants, itself included.
fn tree(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        next += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    all
}

fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}

/// What the threads of these processes are at.
fn states(pids: &BTreeSet<u32>) -> String {
    let mut text = String::new();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let _ = writeln!(
                text,
                "{pid} {:?} {} wchan {} syscall {}\n{}",
                task.file_name(),
                read("comm").trim(),
                read("wchan"),
                read("syscall").trim(),
                read("stack").trim()
            );
        }
    }
    text
}

fn reading(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// The beginning of what was said, if whoever said it is gone.
fn said(reader: thread::JoinHandle<Vec<u8>>) -> String {
    let patience = Instant::now() + Duration::from_secs(5);
    while !reader.is_finished() {
        if Instant::now() > patience {
            return "(still held open)".into();
        }
        thread::sleep(LOOK);
    }
    let bytes = reader.join().unwrap();
    String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned()
}

/// Runs a command until it has ended and nobody holds its output open any more.
#[expect(clippy::zombie_processes, reason = "it is waited for by try_wait, or after it was killed")]
pub(crate) fn finish(command: &mut Command, most: Duration) -> Ended {
    let started = Instant::now();
    command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (reading(child.stdout.take()), reading(child.stderr.take()));
    let (mut peak, mut seen, mut ended) = (0, BTreeSet::new(), None);
    loop {
        let here = tree(child.id());
        peak = here.iter().map(|pid| resident(*pid)).fold(peak, u64::max);
        seen.extend(here);
        if ended.is_none() {
            ended = child.try_wait().unwrap();
        }
        if let Some(status) = ended
            && stdout.is_finished()
            && stderr.is_finished()
        {
            let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
            return Ended { status, stdout: stdout.join().unwrap(), stderr, peak, took: started.elapsed() };
        }
        if started.elapsed() > most {
            let states = states(&seen);
            kill_all(child.id(), &seen);
            let _ = child.wait();
            panic!(
                "{command:?} has not ended after {most:?} (its first process: {ended:?})\n{states}\nstdout: \
                 {}\nstderr: {}",
                said(stdout),
                said(stderr)
            );
        }
        thread::sleep(LOOK);
    }
}

/// Kills what is left of a command: its process group, and whoever it started elsewhere and is still held
/// to be of it by its environment.
fn kill_all(root: u32, seen: &BTreeSet<u32>) {
    let pid = |raw: u32| Pid::from_raw(raw as i32);
    if let Some(group) = pid(root) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    for raw in seen {
        let marked = fs::read(format!("/proc/{raw}/environ")).unwrap_or_default();
        if marked.windows(MARK.len()).any(|window| window == MARK.as_bytes())
            && let Some(pid) = pid(*raw)
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// In the environment of everything that is run here.
const MARK: &str = "UHMM_TEST_RUN";

/// `uhmm run` with these options, before `--`.
pub(crate) fn run<S: AsRef<OsStr>>(options: &[&str], program: impl AsRef<OsStr>, arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uhmm"));
    command.arg("run").args(options).arg("--").arg(program).args(arguments);
    command.env(MARK, "1").stdin(Stdio::null());
    command
}

/// A program and its input.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) environment: Vec<(&'static str, &'static str)>,
    pub(crate) input: Option<PathBuf>,
    pub(crate) most: Duration,
}

impl Case {
    pub(crate) fn new(name: &'static str, program: &Path) -> Self {
        Self {
            name,
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            input: None,
            most: Duration::from_secs(120),
        }
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: &[S]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }

    pub(crate) fn input(mut self, file: PathBuf) -> Self {
        self.input = Some(file);
        self
    }

    fn finish(&self, mut command: Command) -> Ended {
        command.env(MARK, "1").envs(self.environment.iter().copied()).stdin(match &self.input {
            Some(file) => Stdio::from(fs::File::open(file).unwrap()),
            None => Stdio::null(),
        });
        finish(&mut command, self.most)
    }

    /// As it is, then with one n-th of its memory for each n of `parts`, on each device, in each way.
    pub(crate) fn squeeze(&self, parts: &[u64]) {
        if !able() {
            return;
        }
        let _alone = alone();
        let place = Place::new(self.name);
        let mut plain = Command::new(&self.program);
        plain.args(&self.arguments);
        let plain = self.finish(plain);
        let natural = plain.peak;
        println!(
            "{:12} natural {:6.1} MiB, {:5.1} s, {}",
            self.name,
            natural as f64 / MIB as f64,
            plain.took.as_secs_f64(),
            plain.status
        );
        assert!(natural > 8 * MIB, "too little memory ({natural} bytes) to show anything");
        let memory = format!("mem:{}", natural * 2 + 64 * MIB);
        for part in parts {
            for device in ["file:", &memory] {
                for way in ["", "--force-fallback"] {
                    self.squeezed(&place, &plain, natural / part, device, way);
                }
            }
        }
    }

    fn squeezed(&self, place: &Place, plain: &Ended, budget: u64, device: &str, way: &str) {
        let stats = place.path("stats.json");
        let _ = fs::remove_file(&stats);
        let ram = format!("{budget}B");
        let mut options = vec!["--ram", &ram, "--device", device, "--stats", stats.to_str().unwrap()];
        options.extend((!way.is_empty()).then_some(way));
        let what = format!("{} with {} KiB on {device} {way}", self.name, budget >> 10);
        let ended = self.finish(run(&options, &self.program, &self.arguments));
        let said = &ended.stderr;
        let stats: serde_json::Value = serde_json::from_slice(
            &fs::read(&stats).unwrap_or_else(|error| panic!("{what}: {error}: {said}")),
        )
        .unwrap();
        let number =
            |name: &str| stats[name].as_u64().unwrap_or_else(|| panic!("{what}: no {name}: {stats}"));
        let counted = number("peak_resident_bytes");
        println!(
            "{:12} {:6.1} MiB {:16} {:4} {:5.1} s, peak {:6.1} (seen {:6.1}) MiB, out {}, back {}, faults {}",
            self.name,
            budget as f64 / MIB as f64,
            device,
            if way.is_empty() { "move" } else { "copy" },
            ended.took.as_secs_f64(),
            counted as f64 / MIB as f64,
            ended.peak as f64 / MIB as f64,
            number("moved_out_pages"),
            number("moved_back_pages"),
            number("faults"),
        );
        assert_eq!(ended.status, plain.status, "{what}: {said}");
        assert_eq!(ended.status.signal(), None, "{what}: {said}");
        assert!(ended.stdout == plain.stdout, "{what}: the output differs: {}", difference(&ended, plain));
        for peak in [counted, ended.peak] {
            assert!(peak <= budget + SLACK, "{what}: peak {peak} of {budget} bytes: {stats}");
        }
        assert!(number("moved_out_pages") > 0, "{what}: {stats}");
        assert_eq!(number("failed_processes"), 0, "{what}: {stats}");
        assert_eq!(number("poisoned_pages"), 0, "{what}: {stats}");
    }
}

fn difference(ours: &Ended, theirs: &Ended) -> String {
    let at = ours.stdout.iter().zip(&theirs.stdout).take_while(|(a, b)| a == b).count();
    let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[at..bytes.len().min(at + 80)]).into_owned();
    format!(
        "at byte {at} of {} and {}: {:?} is not {:?}",
        ours.stdout.len(),
        theirs.stdout.len(),
        show(&ours.stdout),
        show(&theirs.stdout)
    )
}
