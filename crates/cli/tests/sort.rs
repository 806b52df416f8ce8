//! `sort` with its lines in memory, in less memory. Most lines are in order and sorted into reverse order: lines
//! at random would be read at random, which is another test.

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};

use common::{Case, Numbers, Place, program};

const LINES: usize = 1_000_000;

#[test]
fn sort_in_a_half_and_a_quarter() {
    let Some(sort) = program("sort") else { return };
    let place = Place::new("sort-input");
    let input = place.path("lines");
    let mut file = BufWriter::new(File::create(&input).unwrap());
    for (n, number) in Numbers(1).take(LINES).enumerate() {
        let number = if n % 32 == 0 { number } else { n as u64 };
        writeln!(file, "{number:020}").unwrap();
    }
    file.into_inner().unwrap();
    // One thread: how the work is divided depends on the processors, and so does the memory.
    Case::new("sort", &sort)
        .args(&["--reverse", "--parallel=1", "--buffer-size=1G"])
        .env("LC_ALL", "C")
        .input(input)
        .squeeze(&[2, 4]);
}

#[test]
fn sort_with_threads_in_a_half() {
    let Some(sort) = program("sort") else { return };
    let place = Place::new("sort-threads");
    let input = place.path("lines");
    let mut file = BufWriter::new(File::create(&input).unwrap());
    for number in Numbers(2).take(LINES) {
        writeln!(file, "{number:x}").unwrap();
    }
    file.into_inner().unwrap();
    Case::new("sort-threads", &sort)
        .args(&["--parallel=2", "--buffer-size=1G"])
        .env("LC_ALL", "C")
        .input(input)
        .squeeze(&[2]);
}
