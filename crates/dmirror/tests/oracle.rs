//! What the comparison with the kernel's own device has found (`docs/oracle.md`), each by itself.

mod bed;
#[path = "../../uhmm/tests/common/mod.rs"]
mod common;

use bed::{NODES, PAGES, alone, look, machine, pages, read, to_device, words};
use common::{Memory, PAGE, Setup, check, fill, part};
use rustix::mm::{MprotectFlags, munmap};
use uhmm::{ByteSize, PageCount};
use uhmm_dmirror::Error;

with_engine!(Threads, threads_move, threads_fallback:
    what_was_unmapped_is_read_by_no_device,
    what_is_left_of_a_mapping_stays_in_the_table,
    a_touch_brings_one_page,
    what_lies_before_an_obstacle_comes_home,
    a_migration_leaves_what_is_the_device_s_alone,
    pages_in_place_can_be_lent,
);

const PRIVATE: u8 = 0x22;
const RAM: u8 = 0x02;

fn what_was_unmapped_is_read_by_no_device(setup: Setup) {
    alone(setup, "what_was_unmapped_is_read_by_no_device", |setup| {
        let machine = machine(setup, ByteSize::mib(4));
        let handle = machine.open(NODES[0]).unwrap();
        for round in 0..200 {
            let mut memory = Memory::new(8);
            fill(memory.words_mut(0, 8), round);
            to_device(&handle, memory.range()).unwrap();
            // SAFETY: nothing refers to that half; the memory minds no hole.
            unsafe { munmap(memory.page(4).cast(), 4 * PAGE) }.unwrap();
            assert_eq!(read(&handle, part(memory.range(), 4, 1)), Err(Error::Fault), "in round {round}");
        }
    });
}

fn what_is_left_of_a_mapping_stays_in_the_table(setup: Setup) {
    alone(setup, "what_is_left_of_a_mapping_stays_in_the_table", |setup| {
        let machine = machine(setup, ByteSize::mib(4));
        let handle = machine.open(NODES[0]).unwrap();
        let mut memory = Memory::new(PAGES);
        fill(memory.words_mut(0, PAGES), 1);
        assert_eq!(read(&handle, memory.range()).unwrap().1, 1);
        // SAFETY: nothing refers to the pages; the memory minds no hole.
        unsafe { munmap(memory.page(8).cast(), 2 * PAGE) }.unwrap();
        assert_eq!(read(&handle, part(memory.range(), 9, 2)), Err(Error::Fault));
        for rest in [part(memory.range(), 0, 8), part(memory.range(), 10, PAGES - 10)] {
            assert_eq!(read(&handle, rest).unwrap().1, 0, "it is known still");
        }
    });
}

fn a_touch_brings_one_page(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 2);
    to_device(&handle, memory.range()).unwrap();
    for page in [0, 1, 2, 3] {
        // It can be written at once: no copy is left behind.
        common::check_from(memory.words(page, 1), 2, page * PAGE / 8);
        let mut expected = [PRIVATE; PAGES];
        expected[..=page].fill(RAM);
        assert_eq!(look(&handle, memory.range()), expected);
    }
}

fn what_lies_before_an_obstacle_comes_home(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let [handle, other] = [NODES[0], NODES[1]].map(|node| machine.open(node).unwrap());
    let mut memory = Memory::new(8);
    fill(memory.words_mut(0, 8), 3);
    to_device(&other, memory.range()).unwrap();
    memory.protect(4, 1, MprotectFlags::empty());
    assert_eq!(read(&handle, memory.range()), Err(Error::Fault));
    assert_eq!(look(&other, part(memory.range(), 0, 4)), [RAM; 4]);
    assert_eq!(look(&other, part(memory.range(), 5, 3)), [PRIVATE; 3]);
    memory.protect(4, 1, MprotectFlags::READ | MprotectFlags::WRITE);
    check(memory.words(0, 8), 3);
}

fn a_migration_leaves_what_is_the_device_s_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(8);
    fill(memory.words_mut(0, 8), 4);
    let lent = part(memory.range(), 2, 3);
    let mut into = vec![0; lent.bytes()];
    assert_eq!(handle.exclusive(lent, &mut into).unwrap().pages, pages(3));
    // Its contents are the device's to read, as those of the others.
    check(&to_device(&handle, memory.range()).unwrap(), 4);
    assert!(handle.is_exclusive(lent));
    assert_eq!(machine.device_pages(NODES[0]), pages(5));
    check(memory.words(0, 8), 4);
    assert!(!handle.is_exclusive(lent));
}

fn pages_in_place_can_be_lent(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let Ok(coherent) = machine.open(NODES[2]) else { return assert!(setup.forced_fallback) };
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(8);
    fill(memory.words_mut(0, 8), 5);
    to_device(&coherent, memory.range()).unwrap();
    // What may not be written is not brought home for nothing.
    memory.protect(7, 1, MprotectFlags::READ);
    let mut into = vec![0; memory.range().bytes()];
    assert_eq!(handle.exclusive(part(memory.range(), 7, 1), &mut into[..PAGE]), Err(Error::Busy));
    memory.protect(7, 1, MprotectFlags::READ | MprotectFlags::WRITE);
    assert_eq!(machine.device_pages(NODES[2]), pages(8));
    assert_eq!(handle.exclusive(memory.range(), &mut into).unwrap().pages, pages(8));
    check(&words(&into), 5);
    assert_eq!(machine.device_pages(NODES[2]), PageCount::ZERO);
    check(memory.words(0, 8), 5);
}
