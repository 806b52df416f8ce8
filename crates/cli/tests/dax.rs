//! `uhmm dax` as people and programs meet it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

/// A directory with a store in it, gone at the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-cli-dax-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn store(&self) -> String {
        self.0.join("pmem.img").to_str().unwrap().to_owned()
    }

    /// `uhmm dax VERB STORE MORE..`
    fn dax(&self, verb: &str, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uhmm"));
        command.args(["dax", verb]).arg(self.store()).args(more).output().unwrap()
    }

    /// The same, which must succeed; what it said.
    fn ok(&self, verb: &str, more: &[&str]) -> String {
        let output = self.dax(verb, more);
        assert_eq!(output.status.code(), Some(0), "{verb} {more:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, verb: &str, more: &[&str]) -> Value {
        serde_json::from_str(&self.ok(verb, more)).unwrap()
    }

    /// The same, which must fail with this code; why.
    fn refused(&self, code: i32, verb: &str, more: &[&str]) -> String {
        let output = self.dax(verb, more);
        assert_eq!(output.status.code(), Some(code), "{verb} {more:?}: {}", said(&output));
        said(&output)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_namespace_from_its_first_day_to_its_last() {
    let place = Place::new("life");
    let made = place.ok("create", &["--capacity", "64M", "--size", "16M", "--align", "2M", "--name", "logs"]);
    assert_eq!(made, "dax0.0 is 16 MiB, devdax, aligned to 2M\n");
    let made = place.json("create", &["-s", "8M", "-a", "4K", "-m", "fsdax", "--json"]);
    assert_eq!(made, json!([{"chardev": "dax0.1", "size": 8 << 20, "align": 4096, "mode": "fsdax"}]));
    assert_eq!(place.ok("resize", &["dax0.0", "32M"]), "dax0.0 is now 32 MiB, devdax, aligned to 2M\n");
    let listed = place.ok("list", &[]);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(
        lines[0].ends_with("region 0, 64 MiB in pages of 4K, 24 MiB free, 24 MiB of it in one piece"),
        "{listed}"
    );
    let words: Vec<Vec<&str>> = lines[1..].iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["device", "mode", "size", "align", "ranges", "bad", "name"]);
    assert_eq!(words[1], ["dax0.0", "devdax", "32", "MiB", "2M", "2", "0", "B", "logs"]);
    assert_eq!(words[2], ["dax0.1", "fsdax", "8", "MiB", "4K", "1", "0", "B"]);
    place.ok("reconfigure", &["0", "--mode", "system-ram", "--name", "ram"]);
    assert_eq!(place.ok("destroy", &["0.1"]), "dax0.1 is gone\n");
    let devices = place.json("list", &["--json"]);
    assert_eq!(
        devices,
        json!([{"chardev": "dax0.0", "size": 32 << 20, "align": 2 << 20, "mode": "system-ram"}])
    );
}

#[test]
fn the_json_has_the_forms_of_daxctl_and_ndctl() {
    let place = Place::new("json");
    place.ok("create", &["--capacity", "64M", "--region", "3", "-s", "16M"]);
    place.ok("create", &["-s", "16M"]);
    place.ok("destroy", &["dax3.0"]);
    place.ok("create", &["-s", "32M", "-n", "wide"]);
    let mib = 1 << 20;
    let regions = place.json("list", &["--json", "--regions", "--mappings"]);
    assert_eq!(
        regions,
        json!([{
            "path": place.store(), "id": 3, "size": 64 * mib, "available_size": 16 * mib,
            "max_available_extent": 16 * mib, "align": 4096,
            "devices": [
                {"chardev": "dax3.0", "size": 32 * mib, "align": 2 * mib, "mode": "devdax", "mappings": [
                    {"page_offset": 0, "start": 0, "end": 16 * mib - 1, "size": 16 * mib},
                    {"page_offset": 16 * mib, "start": 32 * mib, "end": 48 * mib - 1, "size": 16 * mib},
                ]},
                {"chardev": "dax3.1", "size": 16 * mib, "align": 2 * mib, "mode": "devdax", "mappings": [
                    {"page_offset": 0, "start": 16 * mib, "end": 32 * mib - 1, "size": 16 * mib},
                ]},
            ],
        }])
    );
    place.ok("inject-error", &["dax3.0", "--offset", "16M", "--len", "8K"]);
    place.ok("inject-error", &["dax3.0", "--offset", "12K"]);
    let mut namespaces = place.json("list", &["--json", "--namespaces"]);
    let uuid = namespaces[0]["uuid"].take();
    assert_eq!(uuid.as_str().unwrap().len(), 36);
    assert_eq!(
        namespaces[0],
        json!({
            "dev": "namespace3.0", "mode": "devdax", "map": "mem", "size": 32 * mib, "uuid": null,
            "chardev": "dax3.0", "align": 2 * mib, "name": "wide", "badblock_count": 24,
            "badblocks": [{"offset": 24, "length": 8}, {"offset": 32_768, "length": 16}],
        })
    );
    assert_eq!(
        place.ok("clear-error", &["dax3.0", "--offset", "16M", "--len", "4K"]),
        "dax3.0: 1 pages were bad and are zero now\n"
    );
    assert_eq!(place.ok("clear-error", &["dax3.0"]), "dax3.0: 2 pages were bad and are zero now\n");
    assert!(place.json("list", &["--json", "-N"])[0].get("badblock_count").is_none());
    place.ok("destroy", &["dax3.1"]);
    place.ok("reconfigure", &["dax3.0", "-m", "fsdax"]);
    let mut namespaces = place.json("list", &["--json", "--namespaces"]);
    namespaces[0]["uuid"].take();
    assert_eq!(
        namespaces,
        json!([{
            "dev": "namespace3.0", "mode": "fsdax", "map": "mem", "size": 32 * mib, "uuid": null,
            "sector_size": 512, "align": 2 * mib, "name": "wide",
        }])
    );
    place.ok("destroy", &["dax3.0"]);
    let path = place.store();
    assert_eq!(
        place.json("list", &["--json", "--regions"]),
        json!([{
            "path": path, "id": 3, "size": 64 * mib, "available_size": 64 * mib,
            "max_available_extent": 64 * mib, "align": 4096,
        }])
    );
    place.ok("create", &[]);
    let full = &place.json("list", &["--json", "--regions"])[0];
    assert!(full.get("available_size").is_none() && full.get("max_available_extent").is_none(), "{full}");
}

#[test]
fn what_cannot_be_is_a_word_and_a_code() {
    let place = Place::new("wrong");
    let told = place.refused(2, "list", &[]);
    assert!(told.contains("does not exist") && told.contains("--capacity"), "{told}");
    let told = place.refused(2, "create", &["--capacity", "64M", "-s", "3M"]);
    assert!(told.contains("3145728 bytes is no size for a namespace aligned to 2M"), "{told}");
    assert!(!PathBuf::from(place.store()).exists(), "nothing is left of it");
    place.ok("create", &["--capacity", "64M", "-s", "48M"]);
    for (code, verb, more, part) in [
        (2, "create", &["--capacity", "64M"][..], "exists; --capacity is for a store that does not"),
        (2, "create", &["-a", "64K"], "65536 bytes is no alignment"),
        (2, "create", &["-m", "raw"], "the modes are devdax, fsdax and system-ram"),
        (2, "create", &["-s", "2M", "-n", "a\nb"], "the name \"a\\nb\" has control characters"),
        (1, "create", &["-s", "18M"], "18 MiB is needed and 16 MiB is free at an alignment of 2M"),
        (2, "resize", &["dax0.0", "3M"], "multiple of 2097152"),
        (1, "resize", &["dax0.0", "1G"], "976 MiB is needed and 16 MiB is free"),
        (2, "destroy", &["dax0.7"], "there is no namespace 7"),
        (2, "destroy", &["dax1.0"], "there is no dax1.0 in"),
        (2, "destroy", &["logs"], "\"logs\" names no namespace"),
        (2, "reconfigure", &["dax0.0"], "--mode"),
        (2, "reconfigure", &["dax0.0", "-a", "1G"], "is not aligned to 1G"),
        (2, "inject-error", &["dax0.0", "--offset", "100"], "100+4096 are no whole 4096-byte pages"),
        (2, "inject-error", &["dax0.0", "--offset", "48M"], "50331648+4096"),
        (2, "clear-error", &["dax0.0", "--offset", "0"], "--len"),
    ] {
        let told = place.refused(code, verb, more);
        assert!(told.contains(part), "{verb} {more:?}: {told}");
    }
}

#[test]
fn labels_that_are_lost_are_never_formatted() {
    let place = Place::new("labels");
    place.ok("create", &["--capacity", "16M", "-s", "4M"]);
    place.ok("create", &["-s", "4M"]);
    let whole = fs::read(place.store()).unwrap();
    let copy = 128 << 10;
    let mut one = whole.clone();
    one[40] ^= 1;
    fs::write(place.store(), &one).unwrap();
    let listed = place.dax("list", &["--json"]);
    assert!(
        said(&listed).contains("one of the two copies of the labels is broken: the checksum is"),
        "{}",
        said(&listed)
    );
    assert_eq!(listed.status.code(), Some(0));
    let mut both = one;
    both[copy + 40] ^= 1;
    fs::write(place.store(), &both).unwrap();
    for (verb, more) in [("list", &[][..]), ("create", &["-s", "2M"]), ("destroy", &["0"])] {
        let told = place.refused(1, verb, more);
        assert!(
            told.contains("neither copy of its labels can be used") && told.contains("Nothing was changed"),
            "{told}"
        );
    }
    assert!(fs::read(place.store()).unwrap() == both);
    fs::write(place.store(), vec![b'x'; 4 << 20]).unwrap();
    assert!(place.refused(2, "list", &[]).contains("is no store"));
}

#[test]
fn there_is_a_manual_page_for_every_verb() {
    let place = Place::new("man");
    let directory = place.0.join("man1");
    let status = Command::new(env!("CARGO_BIN_EXE_uhmm")).arg("man").arg(&directory).status().unwrap();
    assert!(status.success());
    let page = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    assert!(page("uhmm.1").contains("uhmm\\-dax(1)"));
    for verb in ["create", "list", "resize", "destroy", "reconfigure", "inject-error", "clear-error"] {
        let text = page(&format!("uhmm-dax-{verb}.1"));
        assert!(text.contains(".SH SYNOPSIS") && text.contains("STORE"), "{text}");
    }
    assert!(page("uhmm-dax-create.1").contains("\\-\\-capacity"));
}
