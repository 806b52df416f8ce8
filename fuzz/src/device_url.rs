//! The names of devices.

use uhmm_addr::ByteSize;
use uhmm_devices::DeviceUrl;

/// No text makes the parser panic, a refusal says why, and a URL that is printed parses to itself.
pub fn run(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    for default in [None, Some(ByteSize::gib(1))] {
        match DeviceUrl::parse(text, default) {
            Ok(url) => {
                let printed = url.to_string();
                assert_eq!(DeviceUrl::parse(&printed, None), Ok(url), "{text:?} prints as {printed:?}");
            }
            Err(error) => assert!(!error.to_string().is_empty(), "{text:?}"),
        }
    }
}

/// URLs, and what is nearly one.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts(&[
        "mem:1GiB",
        "mem:?size=1.5G",
        "mem:",
        "file:",
        "file:?size=1G",
        "file:/a/b?size=64GiB",
        "file:///a/b",
        "file:far.img",
        "file:/a%20b%3F%25",
        "file:/a?size=1G&size=2G",
        "file:/a?layers=lz4,seal,check",
        "gpu:0",
    ])
}
