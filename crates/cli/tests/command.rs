//! The command as people meet it: exit codes, and what is said.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn uhmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uhmm"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    uhmm(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether programs can be run here; else says why not.
fn able() -> bool {
    let doctor = output(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    if report["run_works"] != true {
        println!("skipped: {}", report["reason"]);
    }
    report["run_works"] == true
}

/// A directory that is gone at the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-command-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, mode: u32, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An ELF program without a dynamic loader that ends with code 42.
fn static_program() -> Vec<u8> {
    let code = [0xbf, 42, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let base: u64 = 0x40_0000;
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    bytes.resize(16, 0);
    for half in [2_u16, 62] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1_u32.to_le_bytes());
    for word in [base + 120, 64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    // One segment to be loaded, readable and executable.
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(5_u32.to_le_bytes());
    let len = 120 + code.len() as u64;
    for word in [0, base, base, len, len, 4096] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(code);
    bytes
}

#[test]
fn what_cannot_be_is_said_with_the_value_and_code_2() {
    for (args, words) in [
        (&["run", "--", "true"][..], &["--ram"][..]),
        (&["run", "--ram", "64MiB"], &["PROGRAM"]),
        (&["run", "--ram", "much", "--", "true"], &["much", "K, M, G or T"]),
        (&["run", "--ram", "0", "--", "true"], &["4 MiB"]),
        (&["run", "--ram", "3MiB", "--", "true"], &["3 MiB", "4 MiB"]),
        (&["run", "--ram", "64XB", "--", "true"], &["unit"]),
        (&["run", "--ram", "99999999999T", "--", "true"], &["2^64"]),
        (&["run", "--ram", "64MiB", "--device", "", "--", "true"], &["mem:1GiB"]),
        (&["run", "--ram", "64MiB", "--device", "disk", "--", "true"], &["disk"]),
        (&["run", "--ram", "64MiB", "--device", "ftp:x", "--", "true"], &["ftp"]),
        (&["run", "--ram", "64MiB", "--device", "mem:", "--", "true"], &["mem:1GiB"]),
        (&["run", "--ram", "64MiB", "--device", "mem:0", "--", "true"], &["zero"]),
        (
            &["run", "--ram", "64MiB", "--device", "mem:1GiB?type=coherent", "--", "true"],
            &["library", "mem:1GiB, whose"],
        ),
        (&["run", "--ram", "64MiB", "--device", "mem:99999999999T", "--", "true"], &["2^64"]),
        (&["run", "--ram", "64MiB", "--device", "file:/x?layers=lz4", "--", "true"], &["layers"]),
        (&["run", "--ram", "64MiB", "--stats", "/nowhere/at/all", "--", "true"], &["/nowhere/at/all"]),
        (&["bench", "no-such-row"], &["no-such-row", "rows are"]),
        (&["sing"], &["sing"]),
    ] {
        let output = output(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", said(&output));
        for word in words {
            assert!(said(&output).contains(word), "{args:?} says {:?}, without {word:?}", said(&output));
        }
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_device_that_cannot_be_opened_is_code_2() {
    if !able() {
        return;
    }
    let place = Place::new("device");
    let short = place.file("short", 0o600, b"x");
    for (url, word) in [
        ("file:/nowhere/at/all?size=1G".to_owned(), "/nowhere/at"),
        (format!("file:{}", place.path("new")), "?size="),
        (format!("file:{short}"), "1 bytes"),
        (format!("file:{}", place.0.display()), "directory"),
    ] {
        let output = output(&["run", "--ram", "64MiB", "--device", &url, "--", "true"]);
        assert_eq!(output.status.code(), Some(2), "{url}: {}", said(&output));
        assert!(said(&output).contains(word), "{url} says {:?}", said(&output));
    }
}

#[test]
fn programs_that_are_not_there_or_not_executable() {
    let place = Place::new("programs");
    let flat = place.file("flat", 0o644, b"#!/bin/sh\n");
    let lost = place.file("lost", 0o755, b"#!/nowhere/at/all\n");
    let directory = place.0.to_str().unwrap().to_owned();
    for (program, code) in [
        ("no-such-program-anywhere", 127),
        ("/nowhere/at/all", 127),
        ("", 127),
        (&flat, 126),
        (&lost, 126),
        (&directory, 126),
    ] {
        let output = output(&["run", "--ram", "64MiB", "--", program]);
        assert_eq!(output.status.code(), Some(code), "{program}: {}", said(&output));
        assert!(said(&output).contains(program), "{program}: {}", said(&output));
    }
}

#[test]
fn programs_that_cannot_be_helped_are_refused_or_run_as_they_are() {
    let place = Place::new("static");
    let program = place.file("static", 0o755, &static_program());
    let refused = output(&["run", "--ram", "64MiB", "--", &program]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("static") && said(&refused).contains("--best-effort"));
    let stats = place.path("stats");
    let run = output(&["run", "--ram", "64MiB", "--best-effort", "--stats", &stats, "--", &program]);
    assert_eq!(run.status.code(), Some(42), "{}", said(&run));
    assert!(said(&run).contains("runs as it is"));
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    assert_eq!((&stats["exit"], &stats["helped"]), (&42.into(), &false.into()));
    let setuid = place.file("setuid", 0o755, &fs::read("/bin/true").unwrap());
    fs::set_permissions(&setuid, fs::Permissions::from_mode(0o4755)).unwrap();
    let refused = output(&["run", "--ram", "64MiB", "--", &setuid]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(said(&refused).contains("setuid"));
}

#[test]
fn programs_with_file_capabilities_are_refused_or_run_as_they_are() {
    if !able() {
        return;
    }
    let place = Place::new("capabilities");
    let program = place.file("capable", 0o755, &fs::read("/bin/true").unwrap());
    // Revision 2, effective: permitted is CAP_NET_RAW (13), nothing is inherited.
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let flags = rustix::fs::XattrFlags::empty();
    if let Err(errno) = rustix::fs::setxattr(&program, "security.capability", &bytes, flags) {
        println!("skipped: a file cannot be given capabilities here: {errno}");
        return;
    }
    let script = place.file("script", 0o755, format!("#!{program}\n").as_bytes());
    for name in [&program, &script] {
        let refused = output(&["run", "--ram", "64MiB", "--", name]);
        assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
        assert!(
            said(&refused).contains("capabilities") && said(&refused).contains(&program),
            "{}",
            said(&refused)
        );
        let run = output(&["run", "--ram", "64MiB", "--best-effort", "--", name]);
        assert_eq!(run.status.code(), Some(0), "{}", said(&run));
        assert!(said(&run).contains("runs as it is"));
    }
}

#[test]
fn limits_that_leave_no_room_for_an_agent_are_said() {
    for limit in ["ulimit -v", "ulimit -f"] {
        for (options, code) in
            [(&["run", "--ram", "64MiB"][..], 2), (&["run", "--ram", "64MiB", "--best-effort"], 6)]
        {
            let mut shell = Command::new("sh");
            shell
                .arg("-c")
                .arg(format!("{limit} 8000000; exec \"$@\""))
                .arg("sh")
                .arg(env!("CARGO_BIN_EXE_uhmm"));
            let output = shell.args(options).args(["--", "sh", "-c", "exit 6"]).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{limit}: {}", said(&output));
            assert!(said(&output).contains(limit), "{}", said(&output));
        }
    }
}

#[test]
fn where_nothing_can_be_written_the_program_s_end_is_still_ours() {
    if !able() {
        return;
    }
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    // Nobody reads from it.
    let unread = || Stdio::from(std::io::pipe().unwrap().1);
    for errors in [full(), unread()] {
        let mut run = uhmm(&["run", "--ram", "64MiB", "--", "sh", "-c", "exit 3"]);
        assert_eq!(run.stderr(errors).status().unwrap().code(), Some(3));
    }
    for args in [&["doctor"][..], &["doctor", "--json"]] {
        assert_eq!(uhmm(args).stdout(unread()).status().unwrap().signal(), Some(13));
        let output = uhmm(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains("standard output"), "{}", said(&output));
    }
}

#[test]
fn the_program_s_end_is_ours() {
    if !able() {
        return;
    }
    for (script, code, signal) in
        [("exit 0", Some(0), None), ("exit 77", Some(77), None), ("kill -SEGV $$", None, Some(11))]
    {
        let output = output(&["run", "--ram", "64MiB", "--device", "mem:64MiB", "--", "sh", "-c", script]);
        let status = output.status;
        assert_eq!((status.code(), status.signal()), (code, signal), "{script}: {}", said(&output));
        let last = said(&output);
        let last = last.lines().last().unwrap_or_default();
        assert!(last.starts_with("uhmm: peak "), "{script}: {last:?}");
    }
    let quiet = output(&["run", "--ram", "64MiB", "--quiet", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((&quiet.stdout[..], &quiet.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
}

#[test]
fn a_signal_that_is_sent_to_us_reaches_the_program() {
    if !able() {
        return;
    }
    let script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = uhmm(&["run", "--ram", "64MiB", "--quiet", "--", "sh", "-c", script]);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("got it\n", Some(5)));
}

#[test]
fn statistics_are_written_and_nobody_stays_behind() {
    if !able() {
        return;
    }
    let place = Place::new("stats");
    let stats = place.path("stats");
    let args = ["run", "--ram", "64MiB", "--stats", &stats, "--", "sh", "-c", "echo $LD_PRELOAD"];
    let output = output(&args);
    assert!(output.status.success(), "{}", said(&output));
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    assert_eq!((&stats["exit"], &stats["ram_bytes"]), (&0.into(), &(64 << 20).into()));
    assert!(stats["processes"].as_u64().unwrap() >= 1, "{stats}");
    // The library is in the keeper, which goes when nobody is left.
    let library = String::from_utf8(output.stdout).unwrap();
    let keeper = library.trim().split('/').nth(2).unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(10);
    while PathBuf::from(format!("/proc/{keeper}/exe")).exists() {
        assert!(Instant::now() < deadline, "the keeper {keeper} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn run_inside_run_is_refused() {
    if !able() {
        return;
    }
    let inner = env!("CARGO_BIN_EXE_uhmm");
    let output = output(&["run", "--ram", "64MiB", "--", inner, "run", "--ram", "8MiB", "--", "true"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("already inside uhmm run"));
}

#[test]
fn help_and_version_and_doctor_speak_to_people() {
    let version = output(&["--version"]);
    assert_eq!(String::from_utf8_lossy(&version.stdout), format!("uhmm {}\n", env!("CARGO_PKG_VERSION")));
    for args in [&["--help"][..], &["run", "--help"]] {
        let help = output(args);
        assert!(help.status.success());
        assert!(String::from_utf8_lossy(&help.stdout).contains("uhmm run --ram 64MiB -- "));
    }
    let doctor = output(&["doctor"]);
    let text = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.status.success() && text.contains("userfaultfd"));
    assert!(text.lines().last().unwrap().starts_with("uhmm run works for this user: "), "{text}");
}

#[test]
fn a_device_cut_short_under_way_ends_the_program_and_names_the_page() {
    if !able() {
        return;
    }
    let place = Place::new("cut");
    let (file, full) = (place.path("device"), place.path("full"));
    let text = "import os, sys\n\
                b = bytearray(96 << 20)\n\
                for i in range(0, len(b), 4096): b[i] = 1\n\
                open(sys.argv[1], 'w').close()\n\
                sys.stdin.read(1)\n\
                print(sum(b[i] for i in range(0, len(b), 4096)))\n";
    let device = format!("file:{file}?size=256MiB");
    let mut child = uhmm(&["run", "--ram", "32MiB", "--device", &device, "--", "python3", "-c", text, &full])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while fs::metadata(&full).is_err() {
        assert!(start.elapsed() < Duration::from_secs(60), "the program does not get anywhere");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(0).unwrap();
    // It reads to the end, and goes on.
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        output.status.signal().or(output.status.code()),
        Some(7),
        "{}: {}",
        output.status,
        said(&output)
    );
    let said = said(&output);
    assert!(said.contains("lost by the device; the first page lost is 0x"), "{said}");
    assert_eq!(output.stdout, b"", "no sum of bytes that are gone");
}

#[test]
fn growth_that_finds_room_nowhere_ends_as_without_memory() {
    if !able() {
        return;
    }
    let text = "b = bytearray(128 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\nprint('never')\n";
    let start = Instant::now();
    let output =
        output(&["run", "--ram", "24MiB", "--device", "mem:16MiB", "--", "/usr/bin/python3", "-c", text]);
    assert_eq!(output.status.signal(), Some(9), "{}: {}", output.status, said(&output));
    assert!(said(&output).contains("out of memory because the device was full"), "{}", said(&output));
    assert_eq!(output.stdout, b"");
    let took = start.elapsed();
    assert!(took > Duration::from_secs(3) && took < Duration::from_secs(60), "{took:?}");
}
