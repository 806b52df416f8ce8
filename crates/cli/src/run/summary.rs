//! What happened, for people and for programs.
//!
//! What     [`line`], the last line on standard error; [`json`], the same and more for `--stats`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use uhmm::tree::shared::Totals;
use uhmm_addr::{ByteSize, PageCount};
use uhmm_core::stats::{Counter, Skip};

use crate::exit::End;

/// Reasons that are worth a word in the line: the program may be slower or larger because of them.
const TOLD: [Skip; 5] = [Skip::Busy, Skip::Refused, Skip::Full, Skip::Failed, Skip::NoFrame];

/// What was run.
pub(crate) struct Ran<'a> {
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
    /// How it ended.
    pub(crate) end: End,
    /// The budget.
    pub(crate) ram: ByteSize,
    /// The device's URL.
    pub(crate) device: &'a str,
    /// Whether it had an agent.
    pub(crate) helped: bool,
}

#[derive(Serialize)]
struct Stats<'a> {
    command: &'a [String],
    exit: i32,
    signal: Option<i32>,
    helped: bool,
    ram_bytes: u64,
    device: &'a str,
    peak_resident_bytes: u64,
    moved_out_pages: u64,
    moved_back_pages: u64,
    taken_back_pages: u64,
    written_pages: u64,
    dropped_clean_pages: u64,
    filled_pages: u64,
    faults: u64,
    fault_p50_us: Option<f64>,
    fault_p99_us: Option<f64>,
    waiting_seconds: f64,
    poisoned_pages: u64,
    first_poisoned: Option<Lost>,
    over_budget: u64,
    device_full: u64,
    out_of_memory: u64,
    failed_processes: u64,
    skipped: BTreeMap<&'static str, u64>,
    processes: u64,
}

/// A page that the device lost.
#[derive(Serialize)]
struct Lost {
    process: u64,
    address: String,
}

fn first_lost(totals: &Totals) -> Option<Lost> {
    let address = format!("{:#x}", totals.first_lost);
    (totals.lost_by != 0).then_some(Lost { process: totals.lost_by, address })
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// All of it, as JSON.
pub(crate) fn json(ran: &Ran<'_>, totals: &Totals) -> Result<String, serde_json::Error> {
    let signal = match ran.end {
        End::Signal(signal) => Some(signal),
        End::Done | End::Code(_) => None,
    };
    let stats = Stats {
        command: &ran.command,
        exit: ran.end.code(),
        signal,
        helped: ran.helped,
        ram_bytes: ran.ram.bytes(),
        device: ran.device,
        peak_resident_bytes: totals.peak_resident_bytes,
        moved_out_pages: totals.get(Counter::MovedOut),
        moved_back_pages: totals.get(Counter::MovedIn),
        taken_back_pages: totals.get(Counter::TakenBack),
        written_pages: totals.get(Counter::Written),
        dropped_clean_pages: totals.get(Counter::DroppedClean),
        filled_pages: totals.get(Counter::Filled),
        faults: totals.get(Counter::Faults),
        fault_p50_us: totals.latency.quantile(0.5).map(micros),
        fault_p99_us: totals.latency.quantile(0.99).map(micros),
        waiting_seconds: totals.waiting_ns as f64 / 1e9,
        poisoned_pages: totals.get(Counter::Poisoned),
        first_poisoned: first_lost(totals),
        over_budget: totals.over_budget,
        device_full: totals.device_full,
        out_of_memory: totals.out_of_memory,
        failed_processes: totals.failed,
        skipped: totals.skipped().map(|(reason, pages)| (reason.name(), pages)).collect(),
        processes: totals.processes,
    };
    serde_json::to_string_pretty(&stats)
}

/// The line.
pub(crate) fn line(ram: ByteSize, totals: &Totals) -> String {
    let pages = |counter| PageCount::new(totals.get(counter) as usize).size();
    let mut text = format!(
        "uhmm: peak {} of {ram} resident, {} out, {} back, {} faults",
        ByteSize::new(totals.peak_resident_bytes),
        pages(Counter::MovedOut),
        pages(Counter::MovedIn),
        totals.get(Counter::Faults),
    );
    if let (Some(p50), Some(p99)) = (totals.latency.quantile(0.5), totals.latency.quantile(0.99)) {
        text += &format!(" (p50 {:.0} us, p99 {:.0} us)", micros(p50), micros(p99));
    }
    text += &format!(", waited {:.1} s", totals.waiting_ns as f64 / 1e9);
    for (count, what) in [
        (totals.over_budget, "times over the budget"),
        (totals.device_full, "times the device was full"),
        (totals.out_of_memory, "processes out of memory because the device was full"),
        (totals.get(Counter::Poisoned), "pages lost by the device"),
        (totals.failed, "processes that uhmm failed"),
    ] {
        if count > 0 {
            text += &format!("; {count} {what}");
        }
    }
    if let Some(Lost { process, address }) = first_lost(totals) {
        text += &format!("; the first page lost is {address} of process {process}");
    }
    let told: Vec<String> = totals
        .skipped()
        .filter(|(reason, _)| TOLD.contains(reason))
        .map(|(reason, pages)| format!("{} {pages}", reason.name()))
        .collect();
    if !told.is_empty() {
        text += &format!("; pages that could not move: {}", told.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use uhmm::tree::shared::ProcessBlock;
    use uhmm_addr::VirtAddr;
    use uhmm_core::stats::Skipped;

    fn totals() -> Totals {
        let block = ProcessBlock::default();
        block.note_resident(ByteSize::kib(65_741));
        block.waiting_ns.store(2_100_000_000, Ordering::Relaxed);
        block.stats.add(Counter::MovedOut, 310 * 256);
        block.stats.add(Counter::MovedIn, 120 * 256);
        block.stats.add(Counter::Faults, 31_234);
        (0..31_234).for_each(|n| block.latency.record(if n % 50 == 0 { 114_000 } else { 9_000 }));
        let mut totals = Totals::default();
        totals.fold(&block);
        totals
    }

    #[test]
    fn the_line_says_it_all() {
        assert_eq!(
            line(ByteSize::mib(64), &totals()),
            "uhmm: peak 64.2 MiB of 64 MiB resident, 310 MiB out, 120 MiB back, 31234 faults \
             (p50 10 us, p99 115 us), waited 2.1 s"
        );
        let block = ProcessBlock::default();
        block.pid.store(77, Ordering::Relaxed);
        block.over_budget.store(3, Ordering::Relaxed);
        for address in [0x7f00_1000, 0x7f00_2000] {
            block.stats.lose(VirtAddr::new(address).page());
        }
        let mut skipped = Skipped::default();
        skipped.add(Skip::Busy, 7);
        skipped.add(Skip::Hole, 9);
        block.stats.skip(&skipped);
        let mut totals = Totals::default();
        totals.fold(&block);
        assert_eq!(
            line(ByteSize::mib(4), &totals),
            "uhmm: peak 0 B of 4 MiB resident, 0 B out, 0 B back, 0 faults, waited 0.0 s; 3 times over the \
             budget; 2 pages lost by the device; the first page lost is 0x7f001000 of process 77; pages that could not move: busy 7"
        );
    }

    #[test]
    fn the_json_has_what_was_promised() {
        let command = vec!["sort".to_owned()];
        let ran = Ran { command, end: End::Signal(9), ram: ByteSize::mib(64), device: "file:", helped: true };
        let value: serde_json::Value = serde_json::from_str(&json(&ran, &totals()).unwrap()).unwrap();
        assert_eq!((&value["exit"], &value["signal"]), (&137.into(), &9.into()));
        assert_eq!(value["moved_out_pages"], 310 * 256);
        assert_eq!(value["command"][0], "sort");
        assert_eq!(value["waiting_seconds"], 2.1);
    }
}
