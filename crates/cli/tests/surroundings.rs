//! What programs run in, and who else has to do with them: job control, limits, wrappers, other libraries, a device
//! that was in use a moment ago, a keeper that is killed.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::{Ended, Place, able, alone, finish, program, run};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

const MOST: Duration = Duration::from_secs(60);
/// What the programs use is 32 MiB and more.
const RAM: &str = "16MiB";
/// Fills memory, waits until a part of it has gone, and sums it up.
const WORK: &str = "import time\n\
                    b = bytearray(32 << 20)\n\
                    for i in range(0, len(b), 4096): b[i] = i >> 12 & 127\n\
                    def resident(): return [int(l.split()[1]) for l in open('/proc/self/status') if 'RssAnon' in l][0]\n\
                    end = time.time() + 30\n\
                    while resident() > 24 << 10 and time.time() < end: time.sleep(0.001)\n\
                    print(sum(b[::4096]), flush=True)\n";
/// What [`WORK`] prints.
const SUM: &str = "520192\n";

fn python() -> Option<PathBuf> {
    // What is found first may be a script that looks for the right one.
    let usual = PathBuf::from("/usr/bin/python3");
    if usual.is_file() { Some(usual) } else { program("python3") }
}

/// `uhmm run`, started by `wrapper`.
fn wrapped(wrapper: &[&str], options: &[&str], program: &str, arguments: &[&str]) -> Command {
    let inner = run(options, program, arguments);
    let mut command = Command::new(wrapper[0]);
    command.args(&wrapper[1..]).arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// The same, started by a shell that executes `script` first.
fn from_shell(script: &str, options: &[&str], program: &str, arguments: &[&str]) -> Command {
    wrapped(&["sh", "-c", &format!("{script}\nexec \"$@\""), "sh"], options, program, arguments)
}

/// Whether [`WORK`] is done under `uhmm run`, started by what `wrap` makes of the options, the program and its
/// arguments.
fn is_helped(name: &str, wrap: impl FnOnce(&[&str], &str, &[&str]) -> Command) {
    let Some(python) = python() else { return };
    let _alone = alone();
    let place = Place::new(name);
    let stats = place.path("stats");
    let options = ["--ram", RAM, "--quiet", "--stats", stats.to_str().unwrap()];
    let ended = finish(&mut wrap(&options, python.to_str().unwrap(), &["-c", WORK]), MOST);
    check(name, &ended, &stats);
}

fn check(name: &str, ended: &Ended, stats: &PathBuf) {
    let said = (ended.status.code(), ended.text(), ended.stderr.as_str());
    assert_eq!(said, (Some(0), SUM.into(), ""), "{name}: {}", ended.status);
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    assert!(stats["helped"] == true && stats["moved_out_pages"].as_u64() > Some(0), "{name}: {stats}");
    assert_eq!(stats["failed_processes"], 0, "{name}: {stats}");
}

/// Kills a process group, unless it hears in time that it has ended.
struct Deadline(Sender<()>);

impl Deadline {
    fn of(group: Pid) -> Self {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            if receiver.recv_timeout(MOST).is_err() {
                let _ = kill_process_group(group, Signal::KILL);
            }
        });
        Self(sender)
    }
}

/// A program under `uhmm run` that is talked to.
struct Talk {
    front: Child,
    out: BufReader<ChildStdout>,
    deadline: Deadline,
}

impl Talk {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let run = run(&["--ram", RAM, "--quiet"], program, arguments);
        // Whoever runs the tests may have signals ignored (`nohup`, a shell's background), which a shell cannot trap.
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(run.get_program()).args(run.get_args());
        command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut front = command.spawn().unwrap();
        let out = BufReader::new(front.stdout.take().unwrap());
        Self { deadline: Deadline::of(Pid::from_child(&front)), front, out }
    }

    fn front(&self) -> Pid {
        Pid::from_child(&self.front)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.front.stdin.as_ref().unwrap(), "{line}").unwrap();
        self.line()
    }

    fn end(mut self) -> Output {
        drop(self.front.stdin.take());
        let output = self.front.wait_with_output().unwrap();
        let _ = self.deadline.0.send(());
        output
    }
}

/// A [`Talk`] with a program that does [`WORK`] and says its number and the keeper's, and sums up whenever it is
/// asked, itself or in a child.
fn summing() -> Option<(Talk, Pid, Pid)> {
    let text = "import os, sys\n\
                print(os.getpid(), os.environ['LD_PRELOAD'].split('/')[2], flush=True)\n\
                for line in sys.stdin:\n\
                \x20 child = os.fork() if line == 'child\\n' else None\n\
                \x20 if child: print('child', os.waitpid(child, 0)[1], flush=True)\n\
                \x20 else: print(sum(b[::4096]), flush=True)\n\
                \x20 if child == 0: os._exit(0)\n";
    let mut talk = Talk::start(python()?.to_str().unwrap(), &["-c", &format!("{WORK}{text}")]);
    assert_eq!(talk.line(), SUM);
    let line = talk.line();
    let mut numbers = line.split_whitespace().map(|word| Pid::from_raw(word.parse().unwrap()).unwrap());
    let (program, keeper) = (numbers.next().unwrap(), numbers.next().unwrap());
    Some((talk, program, keeper))
}

/// The letter for the state of a process; `Z` too when it is gone.
fn state(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('Z')
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < MOST, "{what}: not after {MOST:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_program_that_is_stopped_and_continued_goes_on() {
    if !able() {
        return;
    }
    let _alone = alone();
    let Some((mut talk, program, _)) = summing() else { return };
    let front = talk.front();
    let [to_program, to_front]: [&dyn Fn(Signal); 2] =
        [&|signal| kill_process(program, signal).unwrap(), &|signal| kill_process(front, signal).unwrap()];
    let to_both: &dyn Fn(Signal) = &|signal| kill_process_group(front, signal).unwrap();
    for (what, stop, signal, go_on) in [
        ("the program alone", to_program, Signal::STOP, to_program),
        ("the program alone, politely", to_program, Signal::TSTP, to_program),
        ("the program, continued from in front", to_program, Signal::STOP, to_front),
        ("from in front", to_front, Signal::TSTP, to_front),
        ("from the terminal", to_both, Signal::TSTP, to_both),
        ("both", to_both, Signal::STOP, to_both),
    ] {
        stop(signal);
        // Whoever waits for the one in front is to see it stop as well.
        until(what, || state(program) == 'T' && state(front) == 'T');
        go_on(Signal::CONT);
        until(what, || state(program) != 'T' && state(front) != 'T');
        assert_eq!(talk.ask("sum"), SUM, "{what}");
    }
    // This cannot be passed on.
    to_front(Signal::STOP);
    until("in front alone", || state(front) == 'T');
    assert_eq!(talk.ask("sum"), SUM);
    to_front(Signal::CONT);
    let output = talk.end();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_program_that_is_killed_while_it_is_stopped_ends_both() {
    if !able() {
        return;
    }
    let _alone = alone();
    let Some((talk, program, _)) = summing() else { return };
    kill_process(program, Signal::STOP).unwrap();
    until("stopped", || state(talk.front()) == 'T');
    kill_process(program, Signal::KILL).unwrap();
    assert_eq!(talk.end().status.signal(), Some(9));
}

#[test]
fn an_interrupt_of_the_whole_group_ends_as_the_program_does() {
    if !able() {
        return;
    }
    let _alone = alone();
    for (script, code, signal) in [
        ("echo ready; read line", None, Some(2)),
        ("trap 'exit 9' INT; echo ready; read line", Some(9), None),
        ("trap '' INT; echo ready; read line; exit 4", Some(4), None),
    ] {
        let mut talk = Talk::start("sh", &["-c", script]);
        assert_eq!(talk.line(), "ready\n");
        kill_process_group(talk.front(), Signal::INT).unwrap();
        let status = talk.end().status;
        assert_eq!((status.code(), status.signal()), (code, signal), "{script}");
    }
}

#[test]
fn every_signal_that_asks_for_something_reaches_the_program() {
    if !able() {
        return;
    }
    let _alone = alone();
    let signals = [
        Signal::HUP,
        Signal::INT,
        Signal::QUIT,
        Signal::ABORT,
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::TERM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::WINCH,
        Signal::IO,
        Signal::POWER,
    ];
    let mut script = String::new();
    for number in signals.map(Signal::as_raw) {
        script += &format!("trap 'echo {number}' {number}\n");
    }
    script += "echo ready\nwhile :; do sleep 0.01; done";
    let mut talk = Talk::start("sh", &["-c", &script]);
    assert_eq!(talk.line(), "ready\n");
    for signal in signals {
        kill_process(talk.front(), signal).unwrap();
        assert_eq!(talk.line(), format!("{}\n", signal.as_raw()));
    }
    kill_process_group(talk.front(), Signal::KILL).unwrap();
    assert_eq!(talk.end().status.signal(), Some(9));
}

#[test]
fn scripts_of_scripts_are_helped() {
    if !able() {
        return;
    }
    let Some(python) = python() else { return };
    let place = Place::new("scripts");
    let script = |name: &str, text: String| {
        let path = place.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let direct = script("direct", format!("#!{}\n{WORK}", python.display()));
    // The interpreter gets the script of the one before as its argument.
    let again = script("again", format!("#!{direct}\n"));
    let split = script("split", format!("#!/usr/bin/env -S {} -u\n{WORK}", python.display()));
    for name in [&direct, &again, &split] {
        is_helped("scripts-run", |options, _, _| run::<&str>(options, name, &[]));
    }
}

#[test]
fn a_device_goes_from_one_run_to_the_next() {
    if !able() {
        return;
    }
    let place = Place::new("handover");
    let device = format!("file:{}?size=256MiB", place.path("device").display());
    for n in ["first", "second"] {
        is_helped(&format!("handover-{n}"), |options, program, arguments| {
            run(&[options, &["--device", &device]].concat(), program, arguments)
        });
    }
}

#[test]
fn a_device_that_stays_in_use_is_said_to_be() {
    if !able() {
        return;
    }
    let place = Place::new("in-use");
    let path = place.path("device");
    let file = fs::File::create(&path).unwrap();
    rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
    let device = format!("file:{}?size=64MiB", path.display());
    let ended = finish(&mut run(&["--ram", RAM, "--device", &device], "true", &[""]), MOST);
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    assert!(
        ended.stderr.contains(path.to_str().unwrap()) && ended.stderr.contains("in use"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_program_whose_keeper_is_killed_goes_on_and_says_so() {
    if !able() {
        return;
    }
    let _alone = alone();
    let Some((mut talk, _, keeper)) = summing() else { return };
    assert_eq!((talk.ask("child"), talk.line()), (SUM.into(), "child 0\n".into()));
    kill_process(keeper, Signal::KILL).unwrap();
    until("the keeper is gone", || state(keeper) == 'Z');
    assert_eq!(talk.ask("sum"), SUM);
    // Whose memory nobody can bring: it ends rather than to read zeros.
    assert_eq!(talk.ask("child"), "child 9\n");
    assert_eq!(talk.ask("sum"), SUM);
    let output = talk.end();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("the keeper of this uhmm run cannot be reached"), "{said}");
    assert!(said.contains("the keeper of this uhmm run was killed by signal 9"), "{said}");
}

#[test]
fn standard_files_that_are_closed_at_the_start() {
    let Some(python) = python().filter(|_| able()) else { return };
    let _alone = alone();
    let place = Place::new("closed");
    let stats = place.path("stats");
    let options = ["--ram", RAM, "--stats", stats.to_str().unwrap()];
    let text = format!("{WORK}import sys; sys.exit(7 if sum(b[::4096]) == {} else 8)", SUM.trim());
    let arguments = ["-c", &text];
    let ended =
        finish(&mut from_shell("exec <&- >&- 2>&-", &options, python.to_str().unwrap(), &arguments), MOST);
    assert_eq!(ended.status.code(), Some(7), "{}", ended.status);
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    assert!(stats["moved_out_pages"].as_u64() > Some(0), "{stats}");
}

#[test]
fn many_arguments_and_a_large_environment_arrive() {
    if !able() {
        return;
    }
    let _alone = alone();
    let numbers: Vec<String> = (1..=1000).map(|n| n.to_string()).collect();
    let mut arguments = vec!["-c", "echo $# $1 ${1000} ${#LARGE0} ${#LARGE9}", "sh"];
    arguments.extend(numbers.iter().map(String::as_str));
    let mut command = run(&["--ram", RAM, "--quiet"], "sh", &arguments);
    command.envs((0..10).map(|n| (format!("LARGE{n}"), "x".repeat(120_000))));
    let ended = finish(&mut command, MOST).well();
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("1000 1 1000 120000 120000\n", ""));
}

#[test]
fn a_working_directory_that_is_gone() {
    if !able() {
        return;
    }
    let place = Place::new("gone");
    let gone = place.path("gone");
    let script = format!("mkdir {0} && cd {0} && rmdir {0}", gone.display());
    is_helped("gone-run", |options, program, arguments| from_shell(&script, options, program, arguments));
}

#[test]
fn under_a_low_limit_of_descriptors() {
    if !able() {
        return;
    }
    is_helped("descriptors", |options, program, arguments| {
        from_shell("ulimit -S -n 20", options, program, arguments)
    });
    // The keeper is not meant, as far as it may have more.
    let script = "for n in 1 2 3; do (echo $n | cat); done";
    for (limit, silent) in [("ulimit -S -n 20", true), ("ulimit -n 20", false)] {
        let mut command = from_shell(limit, &["--ram", RAM, "--quiet"], "sh", &["-c", script]);
        let ended = finish(&mut command, MOST).well();
        assert_eq!(ended.text(), "1\n2\n3\n", "{limit}: {}", ended.stderr);
        assert!(!silent || ended.stderr.is_empty(), "{}", ended.stderr);
    }
}

#[test]
fn a_program_that_lowers_its_own_limit_of_descriptors_and_forks() {
    let Some(python) = python().filter(|_| able()) else { return };
    let _alone = alone();
    let text = format!(
        "import os, resource\n{WORK}\
         resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))\n\
         child = os.fork()\n\
         if child == 0: os._exit(0 if sum(b[::4096]) == {} else 1)\n\
         status = os.waitpid(child, 0)[1]\n\
         print(status in (0, 9), sum(b[::4096]))\n",
        SUM.trim()
    );
    let ended = finish(&mut run(&["--ram", RAM, "--quiet"], &python, &["-c", &text]), MOST).well();
    assert_eq!(ended.text(), format!("{SUM}True {SUM}"), "{}", ended.stderr);
}

#[test]
fn under_stacks_without_limit_and_small_ones() {
    if !able() {
        return;
    }
    // Without a limit the kernel lays the address space out from the bottom.
    for limit in ["ulimit -s unlimited 2>/dev/null", "ulimit -s 1024"] {
        is_helped("stacks", |options, program, arguments| from_shell(limit, options, program, arguments));
    }
}

#[test]
fn a_child_without_room_for_an_agent_runs_as_it_is() {
    if !able() {
        return;
    }
    let _alone = alone();
    // The first has no room for the agent's heap, the second none for its page table.
    for limit in [400_000, 8_000_000] {
        let script = format!("ulimit -v {limit}; exec seq 3");
        let ended = finish(&mut run(&["--ram", RAM, "--quiet"], "sh", &["-c", &script]), MOST).well();
        assert_eq!(ended.text(), "1\n2\n3\n", "{}", ended.stderr);
        assert!(ended.stderr.starts_with("uhmm: ") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
    }
}

/// Whether a program is helped when `wrapper` starts the command.
fn started_by(wrapper: &[&str]) {
    if able() && program(wrapper[0]).is_some() {
        is_helped(wrapper[0], |options, program, arguments| wrapped(wrapper, options, program, arguments));
    }
}

#[test]
fn at_a_lower_priority() {
    started_by(&["nice", "-n", "5"]);
}

#[test]
fn on_a_single_processor() {
    started_by(&["taskset", "1"]);
}

#[test]
fn under_a_time_limit() {
    started_by(&["timeout", "50"]);
}

#[test]
fn without_an_environment() {
    started_by(&["env", "-i"]);
}

#[test]
fn in_a_session_of_its_own() {
    started_by(&["setsid", "-w"]);
}

#[test]
fn beside_another_library_that_is_loaded_first() {
    if !able() {
        return;
    }
    let Some(compiler) = program("cc") else { return };
    let place = Place::new("library");
    let (source, library) = (place.path("other.c"), place.path("other.so"));
    fs::write(&source, "unsigned getuid(void) { return 4242; }\n").unwrap();
    finish(Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source), MOST).well();
    is_helped("library-run", |options, program, arguments| {
        let mut command = run(options, program, arguments);
        command.env("LD_PRELOAD", &library);
        command
    });
    let _alone = alone();
    let mut command = run(&["--ram", RAM, "--quiet"], "id", &["-ru"]);
    let ended = finish(command.env("LD_PRELOAD", &library), MOST).well();
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("4242\n", ""));
}

#[test]
fn hundreds_of_short_lived_children_in_batches() {
    if !able() {
        return;
    }
    let _alone = alone();
    let place = Place::new("batches");
    let stats = place.path("stats");
    let script = "sum=0\n\
                  for batch in 1 2 3 4 5 6 7 8 9 10; do\n\
                  \x20 children=\n\
                  \x20 for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do\n\
                  \x20   (exit $n) & children=\"$children $!\"\n\
                  \x20 done\n\
                  \x20 for child in $children; do wait $child; sum=$((sum + $?)); done\n\
                  done\n\
                  echo $sum";
    let options = ["--ram", RAM, "--quiet", "--stats", stats.to_str().unwrap()];
    let ended = finish(&mut run(&options, "sh", &["-c", script]), MOST).well();
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("4650\n", ""));
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    assert!(stats["processes"].as_u64() >= Some(301), "{stats}");
    assert_eq!(stats["failed_processes"], 0, "{stats}");
}

/// A program that forks when it can have no agent in the child: `give_up` is what it does before. Says what was said
/// of it.
fn child_goes_on_without(name: &str, give_up: &str) -> Option<String> {
    let python = python().filter(|_| able())?;
    let _alone = alone();
    let place = Place::new(name);
    let script = format!(
        "import os, resource\n\
         b = bytearray(32 << 20)\n\
         for i in range(0, len(b), 4096): b[i] = i >> 12 & 127\n\
         {give_up}\n\
         pid = os.fork()\n\
         if pid == 0: os._exit(sum(b[::4096]) != 520192)\n\
         print(os.waitpid(pid, 0)[1], sum(b[::4096]))\n"
    );
    let program = place.path("forks.py");
    fs::write(&program, script).unwrap();
    let options = ["--ram", RAM, "--quiet"];
    let ended = finish(&mut run(&options, python.to_str()?, &[program.to_str()?]), MOST).well();
    assert_eq!(ended.text(), "0 520192\n", "{}", ended.stderr);
    Some(ended.stderr)
}

#[test]
fn a_fork_with_no_descriptor_allowed() {
    for most in ["0", "1"] {
        let limit = format!("resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, 4096))");
        let Some(said) = child_goes_on_without(&format!("files-{most}"), &limit) else { return };
        assert!(said.is_empty(), "{said}");
    }
}

#[test]
fn a_child_of_somebody_else_has_its_pages_and_no_help() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can become somebody else");
        return;
    }
    let drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)";
    let Some(said) = child_goes_on_without("drop", drop) else { return };
    assert!(said.contains("another user") && said.contains("goes on without uhmm"), "{said}");
}

#[test]
fn a_child_without_room_for_an_agent_has_its_pages_and_no_help() {
    let limit = "size = int(open('/proc/self/statm').read().split()[0]) * 4096\n\
                 resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20),) * 2)";
    let Some(said) = child_goes_on_without("cramped", limit) else { return };
    assert!(said.is_empty() || said.contains("goes on without uhmm"), "{said}");
}
