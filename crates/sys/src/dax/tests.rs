use super::*;
use crate::memfd::Memfd;

fn first(window: &Window, at: usize) -> u8 {
    // SAFETY: inside the window; the tests read only where a file is mapped.
    unsafe { window.as_ptr().add(at).read_volatile() }
}

#[test]
fn parts_map_parts_at_congruent_addresses() {
    let memfd = Memfd::create("uhmm-test", 4 << 20, None).unwrap();
    rustix::io::pwrite(memfd.fd(), &[7], 3 << 20).unwrap();
    let window = Window::reserve(1 << 20, 2 << 20, 1 << 20, Protection::ReadWrite).unwrap();
    assert_eq!(window.range().start().get() % (2 << 20), 1 << 20);
    window.map(PAGE_SIZE, 1 << 19, memfd.fd(), 3 << 20, false).unwrap();
    assert_eq!(first(&window, PAGE_SIZE), 7);
    window.close(PAGE_SIZE, PAGE_SIZE).unwrap();
    window.map(PAGE_SIZE, PAGE_SIZE, memfd.fd(), 3 << 20, false).unwrap();
    window.forget(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(first(&window, PAGE_SIZE), 7);
    window.write_back(PAGE_SIZE + 5, 9).unwrap();
    // SAFETY: the page is mapped.
    unsafe { flush::lines(window.as_ptr().as_ptr().wrapping_add(PAGE_SIZE + 60), 9) };
    assert!(window.map(0, (1 << 20) + PAGE_SIZE, memfd.fd(), 0, false).is_err(), "longer than the window");
    assert!(window.close(1, PAGE_SIZE).is_err() && window.close(0, 0).is_err());
    let told = window.map(0, PAGE_SIZE, memfd.fd(), 0, true).unwrap_err();
    assert_eq!(told.raw_os_error(), Some(Errno::OPNOTSUPP.raw_os_error()));
}

#[test]
fn the_processor_has_a_way_to_flush() {
    let known = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let expected = match () {
        () if known.contains(" clwb") => Way::Clwb,
        () if known.contains(" clflushopt") => Way::ClflushOpt,
        () => Way::Clflush,
    };
    assert_eq!((flush::way(), flush::way()), (expected, expected));
}

use super::flush::Way;
