//! Sizes as people write them.

use uhmm_addr::ByteSize;

/// No text makes the parser panic, and a size prints as itself, rounded down to one decimal.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(size) = text.parse::<ByteSize>() else { return };
    let printed = size.to_string();
    let Ok(again) = printed.parse::<ByteSize>() else { panic!("{text:?} prints as {printed:?}") };
    assert!(again <= size, "{text:?} prints as {printed:?}");
    assert!(size.bytes() - again.bytes() <= size.bytes() / 10, "{text:?} prints as {printed:?}");
    assert_eq!(size.pages().get() as u64, size.bytes() / 4096, "{text:?}");
}

/// Sizes, and what is nearly one.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts(&[
        "0",
        "4096",
        "64MiB",
        "64M",
        "1.5G",
        "2 GiB",
        "16EiB",
        "18446744073709551615",
        "1e9",
        "-1",
        "0x10",
        "1.0000000000000000001k",
        ".5m",
        "7KB",
    ])
}
