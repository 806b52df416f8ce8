//! Where scenarios are played.
//!
//! What    [`Programs`], built from this workspace: the player twice, once to be loaded with the shim and once static for
//!         the virtual machine. [`Oracle`], the command that runs something there.
//! Fails   with what is missing, or what the machine said instead of an answer.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::compare::{Steps, parse};
use crate::steps::below_target;

/// For a static program, which `crt-static` makes of a build for a named target only.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PLAYER: &str = "uhmm-scenario";
/// Seconds that the virtual machine gets for its start, and for each seed.
const SECONDS: (u64, u64) = (60, 1);

/// What is played with.
pub(super) struct Programs {
    here: PathBuf,
    shim: PathBuf,
    there: PathBuf,
}

/// Runs cargo.
fn cargo(root: &Path, arguments: &[&str], flags: Option<&str>) -> Result<(), String> {
    let mut cargo = Command::new("cargo");
    cargo.args(arguments).current_dir(root);
    if let Some(flags) = flags {
        cargo.env("RUSTFLAGS", flags);
    }
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo {} ended with {status}", arguments.join(" "))),
        Err(error) => Err(format!("cargo: {error}")),
    }
}

/// Builds a static program of package `package`, which `kind` (`--bin`, `--example`) and `name` choose.
fn build_static(root: &Path, package: &str, kind: &str, name: &str) -> Result<PathBuf, String> {
    let build = ["build", "--quiet", "--release", "--target", TARGET, "--package", package, kind, name];
    cargo(root, &build, Some("-C target-feature=+crt-static"))?;
    Ok(below_target(TARGET).join("release"))
}

/// The static example `name` of package `package`.
pub(super) fn static_example(root: &Path, package: &str, name: &str) -> Result<PathBuf, String> {
    Ok(build_static(root, package, "--example", name)?.join("examples").join(name))
}

impl Programs {
    pub(super) fn build(root: &Path) -> Result<Self, String> {
        let here = ["build", "--quiet", "--release", "--package", PLAYER, "--package", "uhmm-dmirror-shim"];
        cargo(root, &here, None)?;
        let release = below_target("release");
        Ok(Self {
            here: release.join(PLAYER),
            shim: release.join("libuhmm_dmirror_shim.so"),
            there: build_static(root, PLAYER, "--bin", PLAYER)?.join(PLAYER),
        })
    }

    /// Plays on our device.
    pub(super) fn play_here(
        &self,
        first: u64,
        last: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Steps, String> {
        let mut player = Command::new(&self.here);
        player.arg(format!("{first}-{last}")).env("LD_PRELOAD", &self.shim);
        let (steps, rest) = listen(player, progress)?;
        complete(steps, &rest, last, "our device")
    }
}

/// A real kernel.
pub(super) struct Oracle {
    run: PathBuf,
    dir: Option<PathBuf>,
}

impl Oracle {
    /// The command `run`, with its kernel in `dir`.
    pub(super) fn find(run: Option<&Path>, dir: Option<&Path>) -> Result<Self, String> {
        let run = run.ok_or(
            "there is no kernel to compare with: say --kernel-run FILE or KERNEL_ORACLE_RUN, a command that runs \
             a line of shell on a kernel with test_hmm",
        )?;
        if !run.is_file() {
            return Err(format!("{} is no command that runs the kernel", run.display()));
        }
        if let Some(dir) = dir
            && !dir.is_dir()
        {
            return Err(format!(
                "{} is no directory with a kernel (--kernel, KERNEL_ORACLE_DIR)",
                dir.display()
            ));
        }
        Ok(Self { run: run.to_owned(), dir: dir.map(Path::to_owned) })
    }

    /// Runs `line` there, with `programs`, for some seconds at most.
    pub(super) fn command(&self, programs: &[&Path], line: &str, seconds: u64) -> Command {
        let mut command = Command::new(&self.run);
        command.args(programs).arg("--").arg(line).env("SECONDS_MAX", seconds.to_string());
        if let Some(dir) = &self.dir {
            command.env("KERNEL_ORACLE_DIR", dir);
        }
        command
    }

    /// Plays on the kernel's device.
    pub(super) fn play(
        &self,
        programs: &Programs,
        first: u64,
        last: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Steps, String> {
        let seconds = SECONDS.0 + SECONDS.1 * (last - first + 1);
        let command = self.command(&[&programs.there], &format!("{PLAYER} {first}-{last}"), seconds);
        let (steps, rest) = listen(command, progress)?;
        complete(steps, &rest, last, "the kernel")
    }
}

/// Runs a player: its steps, and the last lines that are none.
fn listen(mut command: Command, progress: &mut dyn FnMut(u64)) -> Result<(Steps, VecDeque<String>), String> {
    const KEPT: usize = 30;
    let name = command.get_program().to_string_lossy().into_owned();
    let told = |error| format!("{name}: {error}");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(told)?;
    let (mut steps, mut rest, mut line) = (Steps::new(), VecDeque::new(), Vec::new());
    let mut output = BufReader::new(child.stdout.take().ok_or("no output")?);
    while output.read_until(b'\n', &mut line).map_err(told)? > 0 {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        match parse(&text) {
            Some((place, step)) => {
                progress(place.0);
                steps.insert(place, step);
            }
            None => {
                if rest.len() == KEPT {
                    rest.pop_front();
                }
                rest.push_back(text);
            }
        }
        line.clear();
    }
    child.wait().map_err(told)?;
    Ok((steps, rest))
}

/// The steps, if there are any of the last seed: the others are there as well then.
fn complete(steps: Steps, rest: &VecDeque<String>, last: u64, whose: &str) -> Result<Steps, String> {
    if let Some((_, step)) = steps.iter().find(|(_, step)| step.operation.starts_with("open dev")) {
        return Err(format!("{whose} cannot be had: {} | {}", step.operation, step.result));
    }
    if steps.keys().any(|(seed, _)| *seed == last) {
        return Ok(steps);
    }
    let at = steps.iter().next_back().map_or_else(
        || "before it began".to_owned(),
        |((seed, step), told)| format!("behind {seed} {} {}", step.unwrap_or(0), told.operation),
    );
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    Err(format!("{whose} stopped {at}; what else it said:\n{}", rest.join("\n")))
}
