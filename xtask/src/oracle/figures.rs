//! What a page costs, the kernel's device and ours, in one run of the virtual machine.
//!
//! What    [`run`]: has the machine's own `hmmbench` and a static program of ours (`crates/dmirror`, example
//!         `beside_the_kernel`) do the same to 32 MiB, one after the other, and sets the medians side by side.
//! Why     only figures of one run can be compared: the machine is emulated, and slow at other things than real ones.
//! Fails   with what is missing from the output. A goal that is missed is marked, and is a failure.

use std::path::Path;
use std::process::Stdio;

use super::machine::{Oracle, static_example};

const PACKAGE: &str = "uhmm-dmirror";
const EXAMPLE: &str = "beside_the_kernel";
/// The machine's program that measures its own device.
const KERNELS: &str = "hmmbench";
/// Seconds that it all may take.
const SECONDS: u64 = 110;

/// What is measured: how the kernel's program calls it, how ours does, how many times faster ours is to be, and whose.
const ROWS: [(&str, &str, f64, &[&str]); 4] = [
    ("kernel migrate_to_dev:", "migrate-to-device", 3.0, &["library"]),
    ("kernel cpu fault-back:", "fault-back", 2.0, &["library"]),
    ("kernel migrate_to_sys:", "migrate-to-system", 0.0, &[]),
    // Of those that hear of what the program does: who does not must ask the kernel for its own walk. The device answers
    // exactly what the kernel's does.
    ("kernel snapshot:", "snapshot", 5.0, &["threads", "device"]),
];
/// Whose figures there are beside the kernel's.
const OURS: [&str; 4] = ["library", "threads", "one-by-one", "device"];

/// Microseconds a page.
#[derive(Clone, PartialEq, Debug)]
struct Figure {
    what: &'static str,
    who: &'static str,
    kernel: f64,
    ours: f64,
    goal: Option<f64>,
}

impl Figure {
    fn ratio(&self) -> f64 {
        self.kernel / self.ours
    }

    fn met(&self) -> bool {
        self.goal.is_none_or(|goal| self.ratio() >= goal)
    }
}

/// Measures and prints. `false` if a goal is missed.
pub(super) fn run(root: &Path, oracle: &Oracle, json: bool) -> Result<bool, String> {
    let program = static_example(root, PACKAGE, EXAMPLE)?;
    let mut command = oracle.command(&[&program], &format!("{KERNELS}; {EXAMPLE} 2>&1"), SECONDS);
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let told = String::from_utf8_lossy(&output.stdout);
    let figures = figures(&told).map_err(|why| format!("{why}\n{told}"))?;
    if json {
        println!("[{}]", figures.iter().map(as_json).collect::<Vec<_>>().join(","));
    } else {
        print(&figures);
    }
    Ok(figures.iter().all(Figure::met))
}

fn figures(told: &str) -> Result<Vec<Figure>, String> {
    let mut found = Vec::new();
    for who in OURS {
        for (kernels, what, goal, whose) in ROWS {
            let kernel =
                median(told.lines().filter_map(|line| line.strip_prefix(kernels)).filter_map(kernels_figure))
                    .ok_or_else(|| format!("{KERNELS} printed no line {kernels:?}"))?;
            let prefix = format!("{who} {what} ");
            let ours = told.lines().find_map(|line| line.strip_prefix(&prefix)?.trim().parse().ok());
            let ours = ours.ok_or_else(|| format!("{EXAMPLE} printed no line {prefix:?}"))?;
            found.push(Figure { what, who, kernel, ours, goal: whose.contains(&who).then_some(goal) });
        }
    }
    Ok(found)
}

/// The number before `us/page`.
fn kernels_figure(line: &str) -> Option<f64> {
    line.split(" us/page").next()?.split(' ').next_back()?.parse().ok()
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn print(figures: &[Figure]) {
    println!(
        "{:18} {:11} {:>10} {:>10} {:>7} {:>5} met",
        "us a page", "ours is", "kernel", "ours", "ratio", "goal"
    );
    for figure in figures {
        let Figure { what, who, kernel, ours, goal } = figure;
        let (goal, met) = match goal {
            Some(goal) => (format!("{goal:.0}"), if figure.met() { "yes" } else { "no" }),
            None => Default::default(),
        };
        println!("{what:18} {who:11} {kernel:>10.3} {ours:>10.3} {:>7.2} {goal:>5} {met}", figure.ratio());
    }
}

fn as_json(figure: &Figure) -> String {
    let Figure { what, who, kernel, ours, goal } = figure;
    let goal = goal.map_or_else(|| "null".to_owned(), |goal| goal.to_string());
    format!(
        "{{\"name\":\"{what}\",\"ours_is\":\"{who}\",\"unit\":\"us\",\"kernel\":{kernel},\"value\":{ours},\
         \"ratio\":{:.3},\"goal\":{goal},\"met\":{}}}",
        figure.ratio(),
        figure.met()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "kernel migrate_to_dev: ret 0 cpages 8192 49.490 us/page 82.76 MB/s\n\
        kernel cpu fault-back: 42.5 us/page\nkernel migrate_to_sys: ret 0 8.6 us/page\nkernel snapshot: ret 0 0.3 us/page\n\
        kernel migrate_to_dev: ret 0 cpages 8192 30.0 us/page 158.05 MB/s\n\
        kernel migrate_to_dev: ret 0 cpages 8192 24.0 us/page 158.05 MB/s\n";

    fn ours(fault: f64) -> String {
        let one = |who: &str| {
            format!(
                "{who} migrate-to-device 10.0\n{who} fault-back {fault}\n{who} migrate-to-system 1.0\n\
                 {who} snapshot 0.05\n"
            )
        };
        OURS.map(one).concat()
    }

    #[test]
    fn medians_are_compared() {
        let found = figures(&format!("{KERNEL}{}", ours(20.0))).unwrap();
        assert_eq!(found.len(), ROWS.len() * OURS.len());
        assert_eq!((found[0].kernel, found[0].ours, found[0].ratio()), (30.0, 10.0, 3.0));
        assert!(found.iter().all(Figure::met));
        let missed = figures(&format!("{KERNEL}{}", ours(22.0))).unwrap();
        let missed: Vec<_> = missed.iter().filter(|figure| !figure.met()).collect();
        assert_eq!((missed.len(), missed[0].what, missed[0].who), (1, "fault-back", "library"));
        assert!(as_json(missed[0]).contains("\"ratio\":1.932,\"goal\":2,\"met\":false"));
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(figures(KERNEL).unwrap_err().contains("library migrate-to-device"));
        assert!(figures(&ours(1.0)).unwrap_err().contains("kernel migrate_to_dev"));
    }
}
