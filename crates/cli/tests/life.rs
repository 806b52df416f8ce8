//! The ways in which programs start, fork, end, and change their mappings (`programs/life.c`), in much less
//! memory than they use; and who is still there, or holds the output open, when they have ended.

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{Ended, MIB, Place, able, alone, finish, program, run};

const MOST: Duration = Duration::from_secs(60);
/// What the program uses is 40 MiB and more.
const RAM: &str = "16MiB";
const WAYS: [&[&str]; 4] = [
    &["--device", "mem:512MiB"],
    &["--device", "file:"],
    &["--device", "mem:512MiB", "--force-fallback"],
    &["--device", "file:", "--force-fallback"],
];

/// The program, built for this test.
struct Life {
    place: Place,
    binary: PathBuf,
}

impl Life {
    fn build(name: &str) -> Option<Self> {
        if !able() {
            return None;
        }
        let compiler = program("cc")?;
        let place = Place::new(name);
        let binary = place.path("life");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/life.c");
        let mut cc = Command::new(compiler);
        cc.args(["-O1", "-Wall", "-Werror", "-pthread", "-o"]).arg(&binary).arg(source);
        finish(&mut cc, MOST).well();
        Some(Self { place, binary })
    }

    /// Runs a command in each way; gives how it ended and its statistics.
    fn each_way(
        &self,
        program: &str,
        arguments: &[&str],
        mut check: impl FnMut(&str, Ended, serde_json::Value),
    ) {
        let _alone = alone();
        let stats = self.place.path("stats.json");
        for way in WAYS {
            let mut options = vec!["--ram", RAM, "--quiet", "--stats", stats.to_str().unwrap()];
            options.extend(way);
            let what = format!("{arguments:?} {way:?}");
            let ended = finish(&mut run(&options, program, arguments), MOST);
            println!("{what}: {:.1} s", ended.took.as_secs_f64());
            let stats = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
            check(&what, ended, stats);
        }
    }

    /// Does `what`, which says `says`, in each way.
    fn does(&self, what: &str, says: &str) {
        self.each_way(self.binary.to_str().unwrap(), &[what], |what, ended, stats| {
            assert!(ended.status.success(), "{what}: {} {}\n{}", ended.status, ended.stderr, ended.text());
            assert_eq!((ended.text().as_str(), ended.stderr.as_str()), (says, ""), "{what}");
            assert!(stats["moved_out_pages"].as_u64().unwrap() > 0, "{what}: {stats}");
            assert_eq!(stats["failed_processes"], 0, "{what}: {stats}");
        });
    }
}

#[test]
fn parent_and_child_have_memories_of_their_own() {
    let Some(life) = Life::build("both") else { return };
    life.does("both", "both\n");
}

#[test]
fn a_child_outlives_its_parent() {
    let Some(life) = Life::build("daemon") else { return };
    life.does("daemon", "daemon\n");
}

#[test]
fn a_child_that_closes_every_file_outlives_its_parent() {
    let Some(life) = Life::build("closing") else { return };
    life.does("closing-daemon", "daemon\n");
}

#[test]
fn children_of_children() {
    let Some(life) = Life::build("nested") else { return };
    life.does("nested", "nested\n");
}

#[test]
fn many_children_one_after_the_other_and_at_once() {
    let Some(life) = Life::build("many") else { return };
    life.does("many", "many\n");
}

#[test]
fn every_way_to_start_another_program() {
    let Some(life) = Life::build("starts") else { return };
    life.does("starts", "system: shell\nexec\nspawn\nvfork\npopen\nboth\n");
}

#[test]
fn a_fork_that_the_c_library_does_not_see() {
    let Some(life) = Life::build("raw") else { return };
    life.does("raw", "raw\n");
}

#[test]
fn mappings_change() {
    let Some(life) = Life::build("mappings") else { return };
    life.does("mappings", "mappings\n");
}

#[test]
fn the_first_thread_exits_and_the_others_go_on() {
    let Some(life) = Life::build("main-exits") else { return };
    life.does("main-exits", "thread\n");
}

#[test]
fn threads_come_and_go_while_one_forks() {
    let Some(life) = Life::build("threads") else { return };
    life.does("threads-and-forks", "threads and forks\n");
}

#[test]
fn signals_arrive_while_pages_are_away() {
    let Some(life) = Life::build("signals") else { return };
    life.does("signals", "signals\n");
}

#[test]
fn the_end_of_the_program_is_the_end_that_is_seen() {
    let Some(life) = Life::build("ends") else { return };
    let binary = life.binary.to_str().unwrap();
    for (number, code, signal) in
        [("0", Some(0), None), ("77", Some(77), None), ("-9", None, Some(9)), ("-15", None, Some(15))]
    {
        life.each_way(binary, &["exit", number], |what, ended, stats| {
            assert_eq!(
                (ended.status.code(), ended.status.signal()),
                (code, signal),
                "{what}: {}",
                ended.stderr
            );
            assert!(ended.peak <= 48 * MIB, "{what}: {} bytes", ended.peak);
            assert!(stats["moved_out_pages"].as_u64().unwrap() > 0, "{what}: {stats}");
        });
    }
}

#[test]
fn output_is_held_open_as_long_as_the_program_holds_it_and_no_longer() {
    if !able() {
        return;
    }
    let _alone = alone();
    for (script, least, says) in [
        // Whoever reads the output sees its end when the last one who can write has gone.
        ("sleep 0.3 & echo now", 0.3, "now\n"),
        ("sleep 30 >/dev/null 2>&1 & echo $!", 0.0, ""),
        ("exec 1>&- 2>&-; sleep 0.2", 0.2, ""),
    ] {
        let ended = finish(&mut run(&["--ram", RAM, "--quiet"], "sh", &["-c", script]), MOST);
        let took = ended.took.as_secs_f64();
        let ended = ended.well();
        // The one that sleeps on without the output is not wanted any more.
        if let Ok(sleeper) = ended.text().trim().parse::<i32>() {
            let sleeper = rustix::process::Pid::from_raw(sleeper).unwrap();
            rustix::process::kill_process(sleeper, rustix::process::Signal::KILL).unwrap();
        } else {
            assert_eq!(ended.text(), says, "{script}");
        }
        assert!((least..5.0).contains(&took), "{script}: {took} s");
        assert_eq!(ended.stderr, "", "{script}");
    }
}

#[test]
fn input_that_is_not_read_to_its_end() {
    if !able() {
        return;
    }
    let _alone = alone();
    let script = "yes | head -c 1000000 | (head -c 10 >/dev/null); seq 100000 | sort -n | tail -1";
    let ended = finish(&mut run(&["--ram", RAM, "--quiet"], "sh", &["-c", script]), MOST).well();
    assert_eq!(ended.text(), "100000\n");
}
