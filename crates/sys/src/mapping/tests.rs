use uhmm_addr::{PageCount, Vpn};

use super::*;

fn maps_line(range: VaRange) -> Option<String> {
    let start = format!("{:x}-", range.start().get());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find(|line| line.starts_with(&start)).map(str::to_owned)
}

#[test]
fn reserved_pages_are_zero_ours_and_gone_after_drop() {
    let mapping = Mapping::reserve(5 * PAGE_SIZE, "uhmm test").unwrap();
    let range = mapping.range();
    assert!(is_ours(range) && is_ours(VaRange::page(range.first().forward(PageCount::new(4)))));
    assert!(!is_ours(VaRange::page(range.end_page().forward(PageCount::new(CAPACITY * 100_000)))));
    assert!(!is_ours(VaRange::page(Vpn::new(16))));
    // SAFETY: the mapping has five pages, readable and writable, and is used here alone.
    unsafe {
        let last = mapping.as_ptr().as_ptr().add(mapping.len() - 1);
        assert_eq!(last.read(), 0);
        last.write(7);
        mapping.discard(range).unwrap();
        assert_eq!(last.read(), 0);
    }
    mapping.populate().unwrap();
    mapping.dont_dump().unwrap();
    if let Some(line) = maps_line(range) {
        assert!(line.contains("rw-p"), "{line}");
    }
    drop(mapping);
    assert!(maps_line(range).is_none_or(|line| !line.contains("uhmm test")));
}

#[test]
fn alignment_is_kept_and_the_rest_is_trimmed() {
    let chunk = CHUNK_PAGES * PAGE_SIZE;
    for align in [chunk, 1 << 30] {
        let mapping = Mapping::reserve_aligned(3 * chunk, align, "uhmm aligned").unwrap();
        assert!(mapping.range().start().is_aligned_to(align));
        assert_eq!(mapping.len(), 3 * chunk);
        mapping.advise_huge().unwrap();
        mapping.advise_no_huge().unwrap();
    }
}

#[test]
fn nonsense_is_refused() {
    let page = Mapping::reserve(PAGE_SIZE, "uhmm page").unwrap();
    assert!(Mapping::reserve(0, "").is_err());
    assert!(Mapping::reserve(100, "").is_err());
    assert!(Mapping::reserve(1 << 60, "").is_err());
    assert!(Mapping::reserve_aligned(PAGE_SIZE, 3 * PAGE_SIZE, "").is_err());
    let outside = VaRange::page(page.range().end_page());
    assert!(page.discard(outside).is_err());
}

#[test]
fn the_register_follows_many_mappings() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let one = Mapping::reserve(PAGE_SIZE, "uhmm many").unwrap();
                    let two = Mapping::reserve(2 * PAGE_SIZE, "uhmm many").unwrap();
                    assert!(is_ours(one.range()) && is_ours(two.range()));
                }
            });
        }
    });
}

#[test]
fn leaked_pages_stay() {
    let range = Mapping::reserve(PAGE_SIZE, "uhmm leak").unwrap().leak();
    assert!(is_ours(range));
}

#[test]
fn huge_pages_come_from_the_pool_or_not_at_all() {
    match Mapping::hugetlb(Huge::M2.bytes(), Huge::M2) {
        Ok(mapping) => assert!(mapping.range().start().is_aligned_to(Huge::M2.bytes())),
        Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::NOMEM.raw_os_error())),
    }
    assert!(Mapping::hugetlb(PAGE_SIZE, Huge::G1).is_err());
    // A file of huge pages whose pool is empty or not: never more is mapped than asked for.
    if let Ok(file) = crate::memfd::Memfd::create("uhmm-huge", 2 << 20, Some(Huge::M2)) {
        assert!(Mapping::shared(file.fd(), 0, PAGE_SIZE, "").is_err());
    }
}
