use super::*;
use crate::uffd::tests::Memory;

fn regions(scan: &PagemapScan, memory: &Memory, query: Query) -> Vec<(usize, usize)> {
    let mut out = [Region::UNUSED; 16];
    let scanned = scan.scan(memory.range(), query, &mut out).unwrap();
    assert_eq!(scanned.walk_end, memory.range().end());
    let base = memory.first();
    out[..scanned.regions]
        .iter()
        .map(|r| (r.range.first().since(base).get(), r.range.pages().get()))
        .collect()
}

/// Pages: written, written, hole, read (zero), hole, written.
fn mixed() -> Memory {
    let memory = Memory::new(6);
    memory.fill(0, 2, 1);
    assert_eq!(memory.ends(3), (0, 0));
    memory.fill(5, 1, 2);
    memory
}

#[test]
fn contents_zeros_and_holes_are_told_apart() {
    let scan = PagemapScan::open().unwrap();
    let memory = mixed();
    let found = regions(&scan, &memory, Query::PRESENT);
    if scan.is_fallback() {
        println!("skipped: the kernel has no PAGEMAP_SCAN");
        return;
    }
    assert_eq!(found, [(0, 2), (5, 1)]);
    let zero = Query { required: Categories::ZERO, report: Categories::ZERO, ..Query::default() };
    assert_eq!(regions(&scan, &memory, zero), [(3, 1)]);
    let holes = Query { excluded: Categories::PRESENT, ..Query::default() };
    assert_eq!(regions(&scan, &memory, holes), [(2, 1), (4, 1)]);
}

#[test]
fn the_fallback_finds_the_same_but_zeros() {
    let scan = PagemapScan::open_fallback().unwrap();
    let memory = mixed();
    assert_eq!(regions(&scan, &memory, Query::PRESENT), [(0, 2), (3, 1), (5, 1)]);
    assert!(scan.is_fallback());
}

#[test]
fn a_scan_goes_on_where_the_room_ended() {
    for scan in [PagemapScan::open().unwrap(), PagemapScan::open_fallback().unwrap()] {
        // Every second page of 600: more regions than one batch, more pages than one read.
        let memory = Memory::new(1200);
        for page in (0..1200).step_by(2) {
            memory.fill(page, 1, 1);
        }
        let mut out = [Region::UNUSED; 100];
        let (mut found, mut calls) = (0, 0);
        let mut rest = Some(memory.range());
        while let Some(range) = rest {
            let scanned = scan.present(range, &mut out).unwrap();
            for region in &out[..scanned.regions] {
                assert_eq!(region.range.first().since(memory.first()).get(), found * 2);
                found += 1;
            }
            calls += 1;
            rest = range.skip(scanned.walk_end.page().since(range.first()));
        }
        assert_eq!(found, 600);
        assert!((6..=7).contains(&calls), "{calls} calls");
        let none = scan.present(memory.range(), &mut []).unwrap();
        assert_eq!((none.regions, none.walk_end), (0, memory.range().start()));
    }
}

#[test]
fn entries_decode() {
    let all = entry_categories(1 << 63 | 1 << 61);
    assert!(all.contains(Categories::PRESENT.union(Categories::FILE).union(Categories::WRITTEN)));
    assert_eq!(entry_categories(1 << 62 | 1 << 57), Categories::SWAPPED);
    assert_eq!(entry_categories(0), Categories::NONE);
}
