//! What the tests of the device share: a machine, and what a handle does, in words of memory.
#![allow(dead_code, reason = "every test binary uses a part of it")]

use uhmm::{ByteSize, PageCount, VaRange};
use uhmm_dmirror::{Dmirror, Error, Handle, Node};

use crate::common::{self, PAGE, Setup, fill};

pub(crate) const PAGES: usize = 64;
pub(crate) const NODES: [Node; 4] = Node::ALL;

pub(crate) fn machine(setup: Setup, size: ByteSize) -> Dmirror {
    // SAFETY: the tests ask about memory of their own only, and read what a device wrote after it was written.
    unsafe { Dmirror::with(setup.builder(), size) }.unwrap()
}

pub(crate) fn pages(n: usize) -> PageCount {
    PageCount::new(n)
}

pub(crate) fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

pub(crate) fn read(handle: &Handle<'_>, range: VaRange) -> Result<(Vec<u64>, u64), Error> {
    let mut into = vec![0xee; range.bytes()];
    let counts = handle.read(range, &mut into)?;
    assert_eq!(counts.pages, range.pages());
    Ok((words(&into), counts.faults))
}

pub(crate) fn to_device(handle: &Handle<'_>, range: VaRange) -> Result<Vec<u64>, Error> {
    let mut into = vec![0xee; range.bytes()];
    let counts = handle.migrate_to_device(range, &mut into)?;
    assert_eq!(counts.pages, range.pages());
    Ok(words(&into))
}

pub(crate) fn look(handle: &Handle<'_>, range: VaRange) -> Vec<u8> {
    let mut into = vec![0xee; range.pages().get()];
    handle.snapshot(range, &mut into).unwrap();
    into
}

pub(crate) fn pattern(seed: u64, pages: usize) -> Vec<u64> {
    let mut words = vec![0; pages * PAGE / 8];
    fill(&mut words, seed);
    words
}

/// Runs a scenario in which addresses are free for a while in a process of its own: here another test might map something
/// there, and find it gone.
pub(crate) fn alone(setup: Setup, name: &str, scenario: fn(Setup)) {
    common::in_process(&common::name_of(setup, name), None, || scenario(setup));
}
