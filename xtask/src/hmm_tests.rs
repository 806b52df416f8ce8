//! The kernel's own tests of HMM, unmodified, on the device of `crates/dmirror`.
//!
//! What    [`run`]: takes `hmm-tests` and the few files that it includes out of Debian's package of the kernel's source,
//!         builds it, runs it with the shim loaded as often as asked for ([`Options`]), prints its results, and judges them.
//! Why     what the tests expect was written by others, for another implementation.
//! Owns    a directory below the target directory. None of the kernel's code is part of this repository. Four huge
//!         pages, while the tests run, where this user may reserve some.
//! Fails   with exit code 1, and why: the source cannot be had, or the results are not those that are expected. With
//!         exit code 2 where the options make no sense.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use crate::steps::below_target;

const PACKAGE: &str = "linux-source-6.12";
const ARCHIVE: &str = "usr/src/linux-source-6.12.tar.xz";
/// What is taken out of it.
const FILES: [&str; 5] = [
    "tools/testing/selftests/mm/hmm-tests.c",
    "tools/testing/selftests/kselftest.h",
    "tools/testing/selftests/kselftest_harness.h",
    "lib/test_hmm_uapi.h",
    "mm/gup_test.h",
];

/// So many results there are.
const TESTS: usize = 58;
/// Those that are skipped where there are no huge pages.
const HUGE: &str = "anon_write_hugetlbfs";

/// Those that are skipped where there are no coherent devices, which is so where frames are not moved.
const COHERENT: &str = "_device_coherent.";

/// How the tests are run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Options {
    /// How often, one time after the other. The first time that fails is the last.
    repeat: u32,
    /// As on a kernel that cannot move frames.
    fallback: bool,
}

impl Options {
    const USAGE: &str = "usage: cargo xtask hmm-tests [--repeat N] [--fallback]";

    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self { repeat: 1, fallback: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--fallback" => options.fallback = true,
                "--repeat" => {
                    let given = arguments.next().map_or("", String::as_str);
                    options.repeat = given
                        .parse()
                        .ok()
                        .filter(|times| *times > 0)
                        .ok_or_else(|| format!("--repeat takes a number of times, not '{given}'"))?;
                }
                other => return Err(format!("'{other}' is no option of it")),
            }
        }
        Ok(options)
    }
}

/// Gets, builds, runs and judges the tests.
pub(crate) fn run(root: &Path, arguments: &[String]) -> ExitCode {
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}\n{}", Options::USAGE);
            return ExitCode::from(2);
        }
    };
    match try_run(root, options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn try_run(root: &Path, options: Options) -> Result<(), String> {
    let dir = below_target("kernel");
    let source = dir.join("source");
    get_source(&dir, &source)?;
    let program = dir.join("hmm-tests");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-D_GNU_SOURCE", "-I"]).arg(&source).arg(source.join(FILES[0]));
    done(cc.arg("-o").arg(&program).args(["-lpthread", "-lrt"]))?;
    done(Command::new("cargo").args(["build", "--package", "uhmm-dmirror-shim"]).current_dir(root))?;
    let shim = below_target("debug").join("libuhmm_dmirror_shim.so");

    let huge = HugePages::reserve(4);
    if let Err(why) = &huge {
        println!("no huge pages for the tests: {why}");
    }
    for time in 1..=options.repeat {
        let mut tests = Command::new(&program);
        tests.env("LD_PRELOAD", &shim).env("UHMM_FORCED_FALLBACK", if options.fallback { "1" } else { "0" });
        // Its exit code says less than its results.
        let output = tests.output().map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let results = Results::of(&text);
        if let Err(why) = results.judge(huge.is_ok(), !options.fallback) {
            println!("{text}{}", String::from_utf8_lossy(&output.stderr));
            return Err(format!("time {time} of {}: {why}", options.repeat));
        }
        if time == 1 {
            text.lines().filter(|line| is_result(line)).for_each(|line| println!("{line}"));
        }
        if options.repeat > 1 {
            let (passed, skipped) = (results.passed.len(), results.skipped.len());
            println!("time {time} of {}: {passed} passed, {skipped} skipped", options.repeat);
        }
    }
    Ok(())
}

fn is_result(line: &str) -> bool {
    ["ok ", "not ok ", "# Totals:"].iter().any(|start| line.starts_with(start))
}

// --- the source ------------------------------------------------------------------------------------------------

fn get_source(dir: &Path, source: &Path) -> Result<(), String> {
    if FILES.iter().all(|file| source.join(file).exists()) {
        return Ok(());
    }
    let make = |dir: &Path| fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()));
    make(source)?;
    let installed = Path::new("/").join(ARCHIVE);
    let package = dir.join("package");
    let archive = if installed.exists() {
        installed
    } else {
        make(&package)?;
        download(&package)?;
        package.join(ARCHIVE)
    };
    let mut tar = Command::new("tar");
    tar.arg("-xJf").arg(&archive).arg("-C").arg(source).args(["--strip-components=1", "--wildcards"]);
    done(tar.args(FILES.map(|file| format!("*/{file}"))))?;
    // A hundred and fifty megabytes that nobody needs any more.
    let _ = fs::remove_dir_all(&package);
    Ok(())
}

fn download(dir: &Path) -> Result<(), String> {
    let download = || done(Command::new("apt-get").args(["download", "-qq", PACKAGE]).current_dir(dir));
    if download().is_err() {
        // Its lists may be old, or not there; what comes of it, the second attempt tells.
        let _ = done(Command::new("apt-get").args(["update", "-qq"]));
        download()?;
    }
    let entries = fs::read_dir(dir).map_err(|error| error.to_string())?;
    let deb: Option<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let deb = deb.ok_or_else(|| format!("apt-get has downloaded no {PACKAGE}"))?;
    done(Command::new("dpkg-deb").arg("-x").arg(deb).arg(dir))
}

/// Runs a command that is to succeed.
fn done(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command.output().map_err(|error| format!("{name}: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let told = [stdout, stderr].map(|told| String::from_utf8_lossy(&told).into_owned()).concat();
    Err(format!("{name} failed ({status})\n{told}"))
}

// --- huge pages ------------------------------------------------------------------------------------------------

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that were added to the system's pool.
struct HugePages {
    before: u64,
}

impl HugePages {
    fn reserve(pages: u64) -> Result<Self, String> {
        let told = |error: std::io::Error| format!("{POOL}: {error}");
        let read = || -> Result<u64, String> {
            let text = fs::read_to_string(POOL).map_err(told)?;
            text.trim().parse().map_err(|_| format!("{POOL} says {}", text.trim()))
        };
        let reserved = Self { before: read()? };
        fs::write(POOL, format!("{}", reserved.before + pages)).map_err(told)?;
        // Dropped where there are too few: what was taken is given back.
        if read()? < reserved.before + pages { Err("not enough memory".into()) } else { Ok(reserved) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, format!("{}", self.before)) {
            println!("huge pages are left behind: {POOL}: {error}");
        }
    }
}

// --- results ---------------------------------------------------------------------------------------------------

/// The tests by how they ended.
#[derive(Default)]
struct Results<'a> {
    passed: BTreeSet<&'a str>,
    failed: BTreeSet<&'a str>,
    skipped: BTreeSet<&'a str>,
}

impl<'a> Results<'a> {
    /// From lines such as `ok 9 hmm.hmm_device_private.migrate # SKIP why`.
    fn of(text: &'a str) -> Self {
        let mut results = Self::default();
        for line in text.lines() {
            let (list, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
                (Some(rest), _) if rest.contains("# SKIP") => (&mut results.skipped, rest),
                (Some(rest), _) => (&mut results.passed, rest),
                (_, Some(rest)) => (&mut results.failed, rest),
                _ => continue,
            };
            list.extend(rest.split_whitespace().nth(1));
        }
        results
    }

    /// Whether all of them passed that can: those that need huge pages and coherent devices where there are such.
    fn judge(&self, huge: bool, coherent: bool) -> Result<(), String> {
        let mut wrong: Vec<String> = self.failed.iter().map(|name| format!("{name} fails")).collect();
        for name in &self.skipped {
            let lacks = !huge && name.ends_with(HUGE) || !coherent && name.contains(COHERENT);
            if !lacks {
                wrong.push(format!("{name} is skipped"));
            }
        }
        let all = self.passed.len() + self.failed.len() + self.skipped.len();
        if all != TESTS {
            wrong.push(format!("{all} results of {TESTS}"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(change: impl Fn(&str) -> Option<&'static str>) -> String {
        let mut text = "TAP version 13\n1..58\n#  RUN           hmm\n".to_owned();
        for n in 0..TESTS {
            let variant = if n % 2 == 0 { "private" } else { "coherent" };
            let name = format!("hmm.hmm_device_{variant}.test{n}");
            text += &match change(&name).unwrap_or("pass") {
                "pass" => format!("ok {n} {name}\n"),
                "fail" => format!("not ok {n} {name}\n"),
                "skip" => format!("ok {n} {name} # SKIP for a reason\n"),
                _ => String::new(),
            };
        }
        text + "# Totals: pass:58 fail:0 xfail:0 xpass:0 skip:0 error:0\n"
    }

    #[test]
    fn what_is_expected_passes() {
        let text = report(|_| None);
        assert_eq!(Results::of(&text).judge(true, true), Ok(()));
        assert_eq!(Results::of(&text).passed.len(), TESTS);
    }

    #[test]
    fn what_is_not_fails() {
        for instead in ["fail", "skip", "none"] {
            let text = report(|found| found.ends_with("test3").then_some(instead));
            assert!(Results::of(&text).judge(true, true).is_err(), "{instead}");
        }
        assert!(Results::of("").judge(true, true).is_err());
    }

    #[test]
    fn without_coherent_devices_their_tests_are_skipped_and_no_others() {
        let text = report(|found| found.contains(COHERENT).then_some("skip"));
        assert_eq!(Results::of(&text).judge(true, false), Ok(()));
        let text = report(|_| Some("skip"));
        assert!(Results::of(&text).judge(true, false).is_err());
    }

    #[test]
    fn options_are_read_and_nonsense_is_refused() {
        let parse =
            |line: &str| Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse(""), Ok(Options { repeat: 1, fallback: false }));
        assert_eq!(parse("--fallback --repeat 20"), Ok(Options { repeat: 20, fallback: true }));
        for nonsense in ["--repeat", "--repeat 0", "--repeat x", "--all", "20"] {
            assert!(parse(nonsense).is_err(), "{nonsense}");
        }
    }
}
