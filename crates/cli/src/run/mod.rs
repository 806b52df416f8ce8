//! `uhmm run`: a program, a keeper beside it, and this process in front.
//!
//! What     [`run`]: checks everything that can be checked, starts the keeper, then the program; passes signals
//!          on; says at the end what happened.
//! Why      whoever starts `uhmm run prog` must see `prog`: its output, its exit code, its signals.
//! Owns     the keeper and the program, both its children. The program dies with this process; the keeper
//!          stays until the last process of the tree is gone.
//! Fails    before the program starts, with a [`Failure`]; from then on, as the program does.

mod program;
mod summary;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use uhmm::tree::client;
use uhmm::tree::keeper::{Tree, TreeOptions};
use uhmm::tree::protocol::{ENV_SOCKET, TABLE_FILE_BYTES};
use uhmm::tree::shared::Totals;
use uhmm_addr::ByteSize;
use uhmm_devices::{DeviceUrl, FileOptions, OpenError, OpenOptions, Opened};
use uhmm_sys::child::{self, Change, Watch};
use uhmm_sys::socket::Connection;
use uhmm_sys::uffd::{Features, Uffd};

use crate::args::RunArgs;
use crate::exit::{End, Failure};
use crate::print;
use program::{Program, ProgramError};
use summary::Ran;

/// Less than this, no program gets anywhere.
const FLOOR: ByteSize = ByteSize::mib(4);
/// An agent's page table fits into less, of address space and of a file. Little of it is ever used.
const ROOM: ByteSize = ByteSize::new(2 * TABLE_FILE_BYTES);
/// How long a device may be in use yet: the keeper of a run that has ended stays for 2 s, for who may be about to
/// come back.
const HANDOVER: Duration = Duration::from_secs(3);
/// Time between two attempts to open a device.
const ATTEMPT: Duration = Duration::from_millis(20);
/// What a program is managed with at the least. Without any of these, contents could be lost.
const NEEDED: [(Features, &str); 4] = [
    (Features::WP, "write protection (Linux 5.7)"),
    (Features::EVENT_REMAP, "remap events"),
    (Features::EVENT_REMOVE, "remove events"),
    (Features::EVENT_UNMAP, "unmap events"),
];
const PRELOAD: &str = "LD_PRELOAD";
/// The agent, as `build.rs` built it.
static AGENT: &[u8] = include_bytes!(env!("UHMM_AGENT"));

/// Whether programs can be run for this user; else why not.
pub(crate) fn able() -> Result<(), String> {
    let wanted = NEEDED.iter().fold(Features::NONE, |all, (feature, _)| all.union(*feature));
    let uffd = Uffd::open(wanted).map_err(|error| error.to_string())?;
    match NEEDED.iter().find(|(feature, _)| !uffd.features().contains(*feature)) {
        None => Ok(()),
        Some((_, what)) => Err(format!("this userfaultfd lacks {what}")),
    }
}

/// Runs the program.
pub(crate) fn run(args: &RunArgs) -> Result<End, Failure> {
    let url: DeviceUrl =
        args.device.parse().map_err(|error| Failure::usage(format!("--device {}: {error}", args.device)))?;
    if let DeviceUrl::Coherent { size, .. } = url {
        return Err(Failure::usage(format!(
            "--device {}: coherent memory is mapped in place for one process, by the library; \
             a program is run with {}, whose pages come home when they are touched",
            args.device,
            DeviceUrl::Memory { size }
        )));
    }
    if args.ram < FLOOR {
        let why = format!("--ram {} is too little; a program needs {FLOOR} at the least", args.ram);
        return Err(Failure::usage(why));
    }
    if let Some(name) = env::var_os(ENV_SOCKET)
        && name.to_str().is_some_and(|name| Connection::connect(name).is_ok())
    {
        return Err(Failure::usage(
            "already inside uhmm run, whose budget holds for every process started here; leave this one out",
        ));
    }
    let [name, arguments @ ..] = args.command.as_slice() else {
        return Err(Failure::usage("no program; write it behind --"));
    };
    let program = program::find(name, env::var_os("PATH")).map_err(|error| match error {
        ProgramError::NotFound(_) => Failure::NotFound(error.to_string()),
        ProgramError::NotExecutable(..) => Failure::NotExecutable(error.to_string()),
    })?;
    let unaided = unaided(&program, args.best_effort)?;
    let stats = args.stats.as_ref().map(File::create).transpose().map_err(|error| {
        Failure::usage(format!("--stats {}: {error}", args.stats.as_deref().unwrap_or("".as_ref()).display()))
    })?;
    let mut command = Command::new(&program.path);
    command.arg0(name).args(arguments);
    let front = if unaided {
        command.env_remove(ENV_SOCKET);
        None
    } else {
        able().map_err(Failure::failed)?;
        Some(start_keeper(args, &url, &mut command)?)
    };
    let end = attend(command, name)?;
    let totals = front.as_ref().and_then(Front::report);
    if let (Some(totals), false) = (&totals, args.quiet) {
        print::note(&summary::line(args.ram, totals));
    }
    if let Some(file) = stats {
        let ran = Ran {
            command: args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            end,
            ram: args.ram,
            device: &args.device,
            helped: !unaided,
        };
        write_stats(file, &ran, &totals.unwrap_or_default());
    }
    Ok(end)
}

/// Whether to run the program without an agent, because it cannot have one.
fn unaided(program: &Program, best_effort: bool) -> Result<bool, Failure> {
    let helpless = program.helpless.as_ref().map(|(file, why)| (file, why.to_string()));
    match helpless.or_else(|| cramped().map(|why| (&program.path, why))) {
        None => Ok(false),
        Some((file, why)) if best_effort => {
            print::note(&format!("uhmm: {} runs as it is: {why}", file.display()));
            Ok(true)
        }
        Some((file, why)) => Err(Failure::Usage(format!(
            "{} cannot be helped: {why}; with --best-effort it runs as it is",
            file.display()
        ))),
    }
}

/// Why there is no room for an agent in any program that is started here.
fn cramped() -> Option<String> {
    let limits =
        [(Resource::As, "address space is", "ulimit -v"), (Resource::Fsize, "files are", "ulimit -f")];
    limits.into_iter().find_map(|(resource, what, command)| {
        let limit = ByteSize::new(getrlimit(resource).current?);
        let why = || format!("its {what} limited to {limit} ({command}), which has no room for a page table");
        (limit < ROOM).then(why)
    })
}

fn write_stats(mut file: File, ran: &Ran<'_>, totals: &Totals) {
    let text = summary::json(ran, totals).map_err(std::io::Error::from);
    // The program's end is worth more than ours: it decides the exit code.
    if let Err(error) = text.and_then(|text| writeln!(file, "{text}")) {
        print::note(&format!("uhmm: the statistics cannot be written: {error}"));
    }
}

/// What this process knows of the keeper.
struct Front {
    connection: Connection,
    keeper: Pid,
}

impl Front {
    /// What happened, as the keeper knows it.
    fn report(&self) -> Option<Totals> {
        let error = match client::report(&self.connection) {
            Ok(totals) => return Some(totals),
            Err(error) => error,
        };
        print::note(&match child::change_of(self.keeper) {
            Ok(Some(Change::Killed(signal))) => {
                format!("uhmm: no statistics: the keeper of this uhmm run was killed by signal {signal}")
            }
            _ => format!("uhmm: no statistics: {error}"),
        });
        None
    }
}

/// Opens the device, for which another run may have to let go of it.
fn open_device(url: &DeviceUrl) -> Result<Opened, OpenError> {
    // The keeper is forked, which rings of io_uring do not survive. Agents make their own.
    let file = FileOptions::default().io_uring(false);
    let start = Instant::now();
    loop {
        match Opened::open(url, OpenOptions { shared: true, file }) {
            Err(OpenError::Busy { .. }) if start.elapsed() < HANDOVER => thread::sleep(ATTEMPT),
            done => return done,
        }
    }
}

/// Starts the keeper, and makes `command` load the agent.
fn start_keeper(args: &RunArgs, url: &DeviceUrl, command: &mut Command) -> Result<Front, Failure> {
    let device =
        open_device(url).map_err(|error| Failure::usage(format!("--device {}: {error}", args.device)))?;
    let options =
        TreeOptions { budget: args.ram, force_fallback: args.force_fallback, track: !args.no_track };
    let tree = Tree::prepare(&device, AGENT, options).map_err(Failure::failed)?;
    let (connection, end) = Connection::pair()
        .map_err(|error| Failure::Failed(format!("cannot make the keeper's connection: {error}")))?;
    let socket = tree.socket_name().to_owned();
    let library = tree.agent_path();
    // This process's own copies of what the keeper has are closed with the closure.
    let keeper = child::helper(c"uhmm-keeper", &[connection.as_fd()], move || tree.keep(end))
        .map_err(|error| Failure::Failed(format!("the keeper process cannot be started: {error}")))?;
    let agent = library(keeper.as_raw_pid() as u32);
    let before = env::var_os(PRELOAD).filter(|before| !before.is_empty());
    let mut preload = OsString::from(agent);
    if let Some(before) = before {
        preload.push(":");
        preload.push(before);
    }
    command.env(PRELOAD, preload).env(ENV_SOCKET, socket);
    Ok(Front { connection, keeper })
}

/// Starts the program and stays until it has ended.
fn attend(mut command: Command, name: &OsStr) -> Result<End, Failure> {
    let watch = Watch::start().map_err(Failure::failed)?;
    watch.prepare(&mut command);
    let started = command.spawn().map_err(|error| {
        let why = format!("{name:?} cannot be executed: {error}");
        match error.kind() {
            std::io::ErrorKind::NotFound => Failure::NotFound(why),
            _ => Failure::NotExecutable(why),
        }
    })?;
    let program = Pid::from_child(&started);
    loop {
        // What happened before the first signal was waited for counts too.
        match child::change_of(program).map_err(Failure::failed)? {
            Some(Change::Exited(code)) => return Ok(End::Code(code)),
            Some(Change::Killed(signal)) => return Ok(End::Signal(signal)),
            // The shell in front of us is to see it.
            Some(Change::Stopped) => {
                watch.stop_with(program);
                continue;
            }
            None => {}
        }
        let arrived = watch.next();
        // What the kernel sends, as from a terminal, the program gets itself.
        let pass = match arrived.signal {
            Signal::CHILD => false,
            Signal::CONT => true,
            _ => arrived.sent,
        };
        if pass {
            let _ = kill_process(program, arrived.signal);
        }
    }
}
