//! The device of `crates/dmirror` against the kernel's own, step by step.
//!
//! What    [`run`]: plays the same random scenarios here, on our device through the shim, and on a real kernel with
//!         `test_hmm` in a virtual machine; compares what came of each step; reports the first that differs with the
//!         operations that lead to it. With `--figures` it measures both in one run of the machine instead.
//! Why     the kernel's tests say what their authors thought of; random scenarios say where two implementations part.
//! Needs   a virtual machine, built beforehand: a command that runs a line of shell in it, with static programs from
//!         here, and prints what that prints. It is no part of this repository.
//! Fails   with exit code 1 if a step differs or something is missing, and says what; 2 for an argument.

mod compare;
mod figures;
mod machine;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use compare::{Place, Reason, Step, Steps, Verdict, compare};
use machine::{Oracle, Programs};

const USAGE: &str = "usage: cargo xtask oracle [options]

  --seeds FIRST-LAST   the scenarios to play; 1-1000 by default
  --seed N             one scenario, with every step printed
  --kernel-run FILE    the command that runs the kernel's side, as
                           FILE [STATIC PROGRAM..] -- 'SHELL COMMAND'
                       by default what KERNEL_ORACLE_RUN says
  --kernel DIR         where that command finds its kernel (KERNEL_ORACLE_DIR)
  --figures            the figures of both in one run, instead of scenarios
  --json               the result as JSON";

/// Seeds that differ of which a step is printed, besides the first one.
const OTHERS: usize = 20;

/// What is asked for.
#[derive(PartialEq, Eq, Debug)]
struct Asked {
    first: u64,
    last: u64,
    verbose: bool,
    run: Option<PathBuf>,
    kernel: Option<PathBuf>,
    figures: bool,
    json: bool,
}

/// Plays, compares and reports.
pub(crate) fn run(root: &Path, arguments: &[String]) -> ExitCode {
    let asked = match parse(arguments) {
        Ok(asked) => asked,
        Err(why) => {
            eprintln!("oracle: {why}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match carry_out(root, &asked) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("oracle: {why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Result<Asked, String> {
    let mut asked = Asked {
        first: 1,
        last: 1000,
        verbose: false,
        run: std::env::var_os("KERNEL_ORACLE_RUN").map(PathBuf::from),
        kernel: std::env::var_os("KERNEL_ORACLE_DIR").map(PathBuf::from),
        figures: false,
        json: false,
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text} is not the number of a seed"));
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{argument} wants a value"));
        match argument.as_str() {
            "--seeds" => {
                let text = value()?;
                let (first, last) =
                    text.split_once('-').ok_or_else(|| format!("{text} is not FIRST-LAST"))?;
                (asked.first, asked.last) = (number(first)?, number(last)?);
                if asked.first > asked.last {
                    return Err(format!("there are no seeds from {first} to {last}"));
                }
            }
            "--seed" => {
                asked.first = number(value()?)?;
                (asked.last, asked.verbose) = (asked.first, true);
            }
            "--kernel-run" => asked.run = Some(value()?.into()),
            "--kernel" => asked.kernel = Some(value()?.into()),
            "--figures" => asked.figures = true,
            "--json" => asked.json = true,
            other => return Err(format!("{other} is no option")),
        }
    }
    Ok(asked)
}

fn carry_out(root: &Path, asked: &Asked) -> Result<bool, String> {
    let oracle = Oracle::find(asked.run.as_deref(), asked.kernel.as_deref())?;
    if asked.figures {
        return figures::run(root, &oracle, asked.json);
    }
    let programs = Programs::build(root)?;
    let ours = programs.play_here(asked.first, asked.last, &mut progress("ours", asked))?;
    let kernel = oracle.play(&programs, asked.first, asked.last, &mut progress("the kernel's", asked))?;
    let report = Report::of(&kernel, &ours);
    if asked.json {
        println!("{}", report.json(asked));
    } else {
        if asked.verbose {
            for place in ours.keys().chain(kernel.keys().filter(|place| !ours.contains_key(place))) {
                print_step(*place, kernel.get(place), ours.get(place));
            }
        }
        report.print(asked, &kernel, &ours);
    }
    Ok(report.different.is_empty())
}

/// Says on a terminal how far it is.
fn progress<'a>(whose: &'a str, asked: &Asked) -> impl FnMut(u64) + use<'a> {
    let (first, last) = (asked.first, asked.last);
    let (watched, mut told) = (io::stderr().is_terminal(), None);
    move |seed| {
        if watched && told != Some(seed) {
            told = Some(seed);
            let end = if seed == last { "\n" } else { "" };
            eprint!("\r{whose}: {} of {} seeds{end}", seed - first + 1, last - first + 1);
            let _ = io::stderr().flush();
        }
    }
}

/// What a comparison came to.
struct Report {
    steps: usize,
    same: usize,
    /// Steps that differ in nothing but what may.
    excused: usize,
    /// The same by the reason; a step may have several.
    explained: BTreeMap<Reason, usize>,
    /// The first step of each seed that nothing explains.
    different: BTreeMap<u64, Place>,
}

impl Report {
    fn of(kernel: &Steps, ours: &Steps) -> Self {
        let mut report = Self {
            steps: 0,
            same: 0,
            excused: 0,
            explained: Reason::ALL.map(|reason| (reason, 0)).into(),
            different: BTreeMap::new(),
        };
        let places: std::collections::BTreeSet<Place> = kernel.keys().chain(ours.keys()).copied().collect();
        // What is said of a whole seed comes last: it is about what was played before.
        let mut places: Vec<Place> = places.into_iter().collect();
        places.sort_by_key(|(seed, step)| (*seed, step.unwrap_or(u64::MAX)));
        for place in places {
            report.steps += 1;
            let verdict = match (kernel.get(&place), ours.get(&place)) {
                (Some(kernel), Some(ours)) => compare(kernel, ours),
                _ => Verdict::Different,
            };
            match verdict {
                Verdict::Same => report.same += 1,
                Verdict::Explained(reasons) => {
                    report.excused += 1;
                    for reason in reasons {
                        *report.explained.entry(reason).or_default() += 1;
                    }
                }
                Verdict::Different => _ = report.different.entry(place.0).or_insert(place),
            }
        }
        report
    }

    fn print(&self, asked: &Asked, kernel: &Steps, ours: &Steps) {
        if let Some((seed, at)) = self.different.first_key_value() {
            println!("\nseed {seed}, up to the first step that differs:\n");
            for place in ours.keys().filter(|(of, step)| of == seed && *step <= at.1) {
                print_step(*place, kernel.get(place), ours.get(place));
            }
            if !ours.contains_key(at) {
                print_step(*at, kernel.get(at), None);
            }
            if self.different.len() > 1 {
                println!("\nand of other seeds the first step that differs:\n");
            }
            for at in self.different.values().skip(1).take(OTHERS) {
                print_step(*at, kernel.get(at), ours.get(at));
            }
        }
        let reasons: Vec<String> =
            self.explained.iter().map(|(reason, count)| format!("{} {count}", reason.name())).collect();
        println!(
            "\n{} seeds, {} steps: {} the same, {} different for a reason ({}), {} seeds with a difference that nothing \
             explains",
            asked.last - asked.first + 1,
            self.steps,
            self.same,
            self.excused,
            reasons.join(", "),
            self.different.len()
        );
    }

    fn json(&self, asked: &Asked) -> String {
        let reasons: Vec<String> =
            self.explained.iter().map(|(reason, count)| format!("\"{}\":{count}", reason.name())).collect();
        let different: Vec<String> = self
            .different
            .values()
            .map(|(seed, step)| {
                let step = step.map_or_else(|| "null".to_owned(), |step| step.to_string());
                format!("{{\"seed\":{seed},\"step\":{step}}}")
            })
            .collect();
        format!(
            "{{\"first\":{},\"last\":{},\"steps\":{},\"same\":{},\"excused\":{},\"explained\":{{{}}},\"different\":[{}]}}",
            asked.first,
            asked.last,
            self.steps,
            self.same,
            self.excused,
            reasons.join(","),
            different.join(",")
        )
    }
}

fn print_step((seed, step): Place, kernel: Option<&Step>, ours: Option<&Step>) {
    let number = step.map_or_else(|| "-".to_owned(), |step| step.to_string());
    let Some(known) = ours.or(kernel) else { return };
    let result = |step: Option<&Step>| step.map_or("nothing", |step| &step.result).to_owned();
    let marks = if known.marks.is_empty() { String::new() } else { format!(" [{}]", known.marks) };
    let verdict = match (kernel, ours) {
        (Some(kernel), Some(ours)) => compare(kernel, ours),
        _ => Verdict::Different,
    };
    match verdict {
        Verdict::Same => println!("{seed} {number:>2} {}{marks} | {}", known.operation, known.result),
        verdict => {
            let why = match verdict {
                Verdict::Explained(reasons) => {
                    reasons.iter().map(|reason| reason.name()).collect::<Vec<_>>().join(", ")
                }
                _ => "DIFFERENT".to_owned(),
            };
            println!("{seed} {number:>2} {}{marks} | {why}", known.operation);
            println!("        kernel  {}\n        ours    {}", result(kernel), result(ours));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Result<Asked, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn arguments() {
        let all = asked("--seeds 5-9 --kernel-run /a/run --kernel /b --json").unwrap();
        assert_eq!((all.first, all.last, all.verbose, all.json), (5, 9, false, true));
        assert_eq!((all.run, all.kernel), (Some("/a/run".into()), Some("/b".into())));
        let one = asked("--seed 7").unwrap();
        assert_eq!((one.first, one.last, one.verbose), (7, 7, true));
        for wrong in ["--seeds 9-5", "--seeds 9", "--seed x", "--seed", "--sed 4"] {
            assert!(asked(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_difference_of_each_seed_is_told() {
        let steps = |text: &str| text.lines().filter_map(compare::parse).collect::<Steps>();
        let kernel = steps("1 0 fork | ok\n1 1 read 0+1 [s] | 4\n2 0 read 0+1 [s] | 5\n2 1 read 0+1 [s] | 5");
        let ours = steps("1 0 fork | ok\n1 1 read 0+1 [s] | 4\n2 0 read 0+1 [s] | 6\n2 - end | signal 11");
        let report = Report::of(&kernel, &ours);
        assert_eq!((report.steps, report.same, report.excused), (5, 2, 0));
        assert_eq!(report.different, [(2, (2, Some(0)))].into());
        assert!(Report::of(&kernel, &kernel).different.is_empty());
    }
}
