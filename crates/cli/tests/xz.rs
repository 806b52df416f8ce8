//! `xz -6` in half of its memory. Its working set is its memory: there is nothing cold in it.

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};

use common::{Case, Numbers, Place, program};

const WORDS: [&str; 8] = ["cold ", "page ", "comes ", "back ", "when ", "touched,\n", "frame ", "device "];

#[test]
fn xz_in_a_half() {
    let Some(xz) = program("xz") else { return };
    let place = Place::new("xz-input");
    let input = place.path("text");
    let mut file = BufWriter::new(File::create(&input).unwrap());
    for number in Numbers(3).take(5_000) {
        write!(file, "{}{:x}", WORDS[(number >> 61) as usize], number & 0xffff_ffff).unwrap();
    }
    // Memory for its positions, without many more places to look.
    file.write_all(&[b' '; 600 << 10]).unwrap();
    file.into_inner().unwrap();
    Case::new("xz", &xz).args(&["-6", "--threads=1", "--stdout"]).input(input).squeeze(&[2]);
}
