use crate::*;

#[test]
fn sizes_parse_as_people_write_them() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 << 10),
        ("64 MiB", 64 << 20),
        ("64MB", 64_000_000),
        ("1.5GiB", 3 << 29),
        ("2T", 2 << 40),
    ] {
        assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize::new(bytes)), "{text}");
    }
}

#[test]
fn sizes_that_mean_nothing_are_refused() {
    for (text, error) in [
        ("", ParseSizeError::Empty),
        ("MiB", ParseSizeError::Number),
        ("-1", ParseSizeError::Unit),
        ("1.G", ParseSizeError::Number),
        ("1..2G", ParseSizeError::Number),
        ("12 parsecs", ParseSizeError::Unit),
        ("99999999T", ParseSizeError::Overflow),
        ("340282366920938463463374607431768211456", ParseSizeError::Overflow),
    ] {
        assert_eq!(text.parse::<ByteSize>(), Err(error), "{text}");
    }
}

#[test]
fn sizes_print_in_the_largest_unit() {
    assert_eq!(ByteSize::mib(64).to_string(), "64 MiB");
    assert_eq!(ByteSize::new(3 << 29).to_string(), "1.5 GiB");
    assert_eq!(ByteSize::new(17).to_string(), "17 B");
}

#[test]
fn ranges_are_whole_pages_and_never_empty() {
    let at = VirtAddr::new(0x20_0000);
    assert_eq!(VaRange::new(at, 0), Err(RangeError::Empty));
    assert_eq!(VaRange::new(at, 100), Err(RangeError::Misaligned(100)));
    assert_eq!(VaRange::new(VirtAddr::new(0x123), 4096), Err(RangeError::Misaligned(0x123)));
    let top = VirtAddr::new(usize::MAX & !0xfff);
    assert_eq!(VaRange::new(top, 4096), Err(RangeError::Overflow(top)));
    let range = VaRange::new(at, 3 * 4096).unwrap();
    assert_eq!((range.pages().get(), range.end().get()), (3, 0x20_3000));
}

#[test]
fn covering_rounds_outwards() {
    let range = VaRange::covering(VirtAddr::new(0x1fff), 2).unwrap();
    assert_eq!((range.first().get(), range.pages().get()), (1, 2));
    assert_eq!(VaRange::covering(VirtAddr::new(0x1fff), 0), None);
}

#[test]
fn chunks_cut_at_two_megabytes_and_cover_everything() {
    let range = VaRange::of_pages(Vpn::new(500), PageCount::new(600)).unwrap();
    let parts: Vec<_> = range.chunks().map(|r| (r.first().get(), r.pages().get())).collect();
    assert_eq!(parts, [(500, 12), (512, 512), (1024, 76)]);
}

#[test]
fn intersection_is_symmetric_and_may_be_nothing() {
    let of = |start, pages| VaRange::of_pages(Vpn::new(start), PageCount::new(pages)).unwrap();
    assert_eq!(of(0, 10).intersect(of(5, 10)), Some(of(5, 5)));
    assert_eq!(of(5, 10).intersect(of(0, 10)), Some(of(5, 5)));
    assert_eq!(of(0, 5).intersect(of(5, 5)), None);
    assert!(of(0, 10).encloses(of(2, 8)) && !of(0, 10).encloses(of(2, 9)));
}
