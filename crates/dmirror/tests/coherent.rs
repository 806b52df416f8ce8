//! Coherent devices on the running kernel, and pages that a device alone may touch.

mod bed;
#[path = "../../uhmm/tests/common/mod.rs"]
mod common;

use bed::{NODES, PAGES, bytes, look, machine, pages, pattern, read, to_device, words};
use common::{Memory, PAGE, Setup, check, fill, part};
use rustix::mm::MprotectFlags;
use uhmm::{ByteSize, PageCount, PinFor};
use uhmm_dmirror::{Dmirror, Error, Node};

with_engine!(Threads, threads_move, threads_fallback:
    coherent_pages_are_touched_in_place,
    coherent_pages_of_a_mapping_that_may_only_be_read,
    coherent_pages_and_others,
    coherent_pages_that_are_held,
    exclusive_pages,
);

/// A machine with coherent devices, if there can be one: their memory is mapped in place by moving frames.
fn coherent(setup: Setup) -> Option<Dmirror> {
    let machine = machine(setup, ByteSize::mib(4));
    let there = machine.open(NODES[2]).is_ok();
    assert_eq!(there, !setup.forced_fallback);
    there.then_some(machine)
}

fn coherent_pages_are_touched_in_place(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let handle = machine.open(NODES[2]).unwrap();
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 31);
    check(&to_device(&handle, range).unwrap(), 31);
    assert_eq!(machine.device_pages(NODES[2]), pages(PAGES));
    let faults = common::faults(machine.space());
    check(memory.words(0, PAGES), 31);
    fill(memory.words_mut(0, PAGES), 32);
    assert_eq!(common::faults(machine.space()), faults, "touched where they are");
    let (found, missed) = read(&handle, range).unwrap();
    assert_eq!(missed, 0);
    check(&found, 32);
    handle.write(range, &bytes(&pattern(33, PAGES))).unwrap();
    check(memory.words(0, PAGES), 33);
    assert_eq!(machine.device_pages(NODES[2]), pages(PAGES));
    assert_eq!(handle.migrate_to_system(range).unwrap().pages, pages(PAGES));
    assert_eq!(machine.device_pages(NODES[2]), PageCount::ZERO);
    check(memory.words(0, PAGES), 33);
    check(&to_device(&handle, range).unwrap(), 33);
    handle.release().unwrap();
    assert_eq!(machine.device_pages(NODES[2]), PageCount::ZERO);
    check(memory.words(0, PAGES), 33);
}

fn coherent_pages_of_a_mapping_that_may_only_be_read(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let (first, second) = (machine.open(NODES[2]).unwrap(), machine.open(NODES[3]).unwrap());
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 34);
    memory.protect(0, PAGES, MprotectFlags::READ);
    for handle in [&first, &second] {
        check(&read(handle, range).unwrap().0, 34);
    }
    check(&to_device(&second, range).unwrap(), 34);
    check(&read(&first, range).unwrap().0, 34);
    check(memory.words(0, PAGES), 34);
}

fn coherent_pages_and_others(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let [private, _, first, second] = NODES.map(|node| machine.open(node).unwrap());
    let mut memory = Memory::new(4);
    let range = memory.range();
    fill(memory.words_mut(0, 4), 35);
    to_device(&private, part(range, 1, 1)).unwrap();
    to_device(&first, part(range, 2, 1)).unwrap();
    to_device(&second, part(range, 3, 1)).unwrap();
    assert_eq!(look(&private, range), [0x02, 0x22, 0x52, 0x52]);
    assert_eq!(look(&first, range), [0x02, 0x00, 0x42, 0x52]);
    assert_eq!(look(&second, range), [0x02, 0x00, 0x52, 0x42]);
    // One that another device has is not taken from it; everybody reads it where it is.
    assert_eq!(to_device(&first, part(range, 3, 1)), Err(Error::NotThere));
    check(&read(&first, range).unwrap().0, 35);
    assert_eq!(machine.device_pages(NODES[3]), pages(1));
}

fn coherent_pages_that_are_held(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let handle = machine.open(NODES[2]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 36);
    to_device(&handle, memory.range()).unwrap();
    for (for_long, there) in [(false, PAGES), (true, PAGES - 8)] {
        let held = machine.hold(part(memory.range(), 8, 8), pages(8), PinFor::Write, for_long);
        assert_eq!((held.pages, machine.device_pages(NODES[2])), (pages(8), pages(there)));
    }
    check(memory.words(0, PAGES), 36);
}

fn exclusive_pages(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    for node in [NODES[0], NODES[2]] {
        if machine.open(node).is_ok() {
            exclusive_of(&machine, node);
        }
    }
}

fn exclusive_of(machine: &Dmirror, node: Node) {
    let handle = machine.open(node).unwrap();
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 37);
    let mut into = vec![0; range.bytes()];
    assert_eq!(handle.exclusive(range, &mut into).unwrap().pages, pages(PAGES));
    check(&words(&into), 37);
    assert!(handle.is_exclusive(range));
    handle.write(part(range, 0, 8), &bytes(&pattern(38, 8))).unwrap();
    assert!(!handle.is_exclusive(part(range, 0, 8)), "an ordinary store faults, whoever had the page");
    check(memory.words(0, 8), 38);
    assert!(!handle.is_exclusive(part(range, 0, 8)) && handle.is_exclusive(part(range, 8, 8)));
    memory.protect(8, 1, MprotectFlags::READ);
    assert_eq!(handle.exclusive(part(range, 8, 2), &mut into[..2 * PAGE]), Err(Error::Busy));
    memory.protect(8, 1, MprotectFlags::READ | MprotectFlags::WRITE);
    common::check_from(memory.words(8, PAGES - 8), 37, 8 * PAGE / 8);
    assert!(!handle.is_exclusive(range));
}
