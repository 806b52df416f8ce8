//! URLs: what they mean, what is refused and how, and that no text whatever makes the parser panic.

use std::path::PathBuf;

use proptest::prelude::*;
use uhmm_addr::{ByteSize, ParseSizeError};
use uhmm_devices::{DeviceUrl, UrlError};

fn file(path: Option<&str>, size: Option<ByteSize>) -> DeviceUrl {
    DeviceUrl::File { path: path.map(PathBuf::from), size }
}

#[test]
fn urls_mean_what_they_say() {
    let gib = ByteSize::gib(1);
    for (text, url, printed) in [
        ("mem:1GiB", DeviceUrl::Memory { size: gib }, "mem:1GiB"),
        ("mem:1024M", DeviceUrl::Memory { size: gib }, "mem:1GiB"),
        ("mem:?size=1.5G", DeviceUrl::Memory { size: ByteSize::mib(1536) }, "mem:1536MiB"),
        ("mem:1GiB?type=private", DeviceUrl::Memory { size: gib }, "mem:1GiB"),
        ("mem:1GiB?type=coherent", DeviceUrl::Coherent { size: gib, node: None }, "mem:1GiB?type=coherent"),
        (
            "mem:?node=3&type=coherent&size=1G",
            DeviceUrl::Coherent { size: gib, node: Some(3) },
            "mem:1GiB?type=coherent&node=3",
        ),
        ("file:", file(None, None), "file:"),
        ("file:?size=1G", file(None, Some(gib)), "file:?size=1GiB"),
        ("file:/a/b?size=1GiB", file(Some("/a/b"), Some(gib)), "file:/a/b?size=1GiB"),
        ("file:///a/b", file(Some("/a/b"), None), "file:/a/b"),
        ("file:far.img", file(Some("far.img"), None), "file:far.img"),
        ("file:/a%20b%3F%25", file(Some("/a b?%"), None), "file:/a%20b%3F%25"),
        ("file:/with space", file(Some("/with space"), None), "file:/with%20space"),
    ] {
        assert_eq!(text.parse(), Ok(url.clone()), "{text}");
        assert_eq!(url.to_string(), printed);
    }
}

#[test]
fn mem_takes_the_default_size_if_there_is_one() {
    let default = Some(ByteSize::mib(64));
    assert_eq!(DeviceUrl::parse("mem:", default), Ok(DeviceUrl::Memory { size: ByteSize::mib(64) }));
    assert_eq!(DeviceUrl::parse("mem:1M", default), Ok(DeviceUrl::Memory { size: ByteSize::mib(1) }));
    assert_eq!(DeviceUrl::parse("mem:", None), Err(UrlError::SizeNeeded));
}

#[test]
fn what_is_refused_is_named() {
    let bad = |value: &str, reason| UrlError::Size { value: value.into(), reason };
    for (text, error) in [
        ("", UrlError::Empty),
        ("/tmp/x", UrlError::NoScheme("/tmp/x".into())),
        ("disk:/tmp/x", UrlError::UnknownScheme("disk".into())),
        ("redis://h", UrlError::SchemeNotYet("redis".into())),
        ("s3://b/k", UrlError::SchemeNotYet("s3".into())),
        ("gpu:0", UrlError::SchemeNotYet("gpu".into())),
        ("mem:1G?layers=lz4,seal", UrlError::LayersNotYet("lz4,seal".into())),
        ("file:/x?", UrlError::EmptyQuery('?')),
        ("file:/x?size=1G&", UrlError::EmptyQuery('&')),
        ("file:/x?sise=1G", UrlError::UnknownKey("sise".into())),
        ("file:/x?size=1G&size=2G", UrlError::RepeatedSize("2G".into())),
        ("mem:1G?size=2G", UrlError::RepeatedSize("2G".into())),
        ("mem:1G?type=", UrlError::Type(String::new())),
        ("mem:1G?type=Coherent", UrlError::Type("Coherent".into())),
        ("mem:1G?type=private&type=coherent", UrlError::Repeated { key: "type", value: "coherent".into() }),
        ("mem:1G?node=0", UrlError::NodeOfPrivate(0)),
        ("mem:1G?type=private&node=0", UrlError::NodeOfPrivate(0)),
        ("mem:1G?type=coherent&node=", UrlError::Node(String::new())),
        ("mem:1G?type=coherent&node=-1", UrlError::Node("-1".into())),
        ("mem:1G?type=coherent&node=1&node=2", UrlError::Repeated { key: "node", value: "2".into() }),
        ("file:/x?type=coherent", UrlError::MemoryOnly("type")),
        ("file:/x?size=1G&node=0", UrlError::MemoryOnly("node")),
        ("file:/x?size=", bad("", ParseSizeError::Empty)),
        ("file:/x?size", bad("", ParseSizeError::Empty)),
        ("mem:1Gx", bad("1Gx", ParseSizeError::Unit)),
        ("mem:-1G", bad("-1G", ParseSizeError::Unit)),
        ("mem:99999999999T", bad("99999999999T", ParseSizeError::Overflow)),
        ("mem:2000000T", UrlError::SizeTooLarge("2000000T".into())),
        ("mem:0", UrlError::SizeZero("0".into())),
        ("mem:5000", UrlError::SizeNotPages { value: "5000".into(), bytes: 5000 }),
        ("file://host/x", UrlError::Host("//host/x".into())),
        ("file:/x%2", UrlError::Percent("/x%2".into())),
        ("file:/x%zz", UrlError::Percent("/x%zz".into())),
        ("file:/x%00", UrlError::ZeroByte("/x%00".into())),
    ] {
        assert_eq!(text.parse::<DeviceUrl>(), Err(error), "{text}");
    }
}

#[test]
fn messages_say_what_to_write() {
    let message = |text: &str| text.parse::<DeviceUrl>().unwrap_err().to_string();
    assert_eq!(message("mem:"), "mem: needs a size; write mem:1GiB");
    assert!(message("mem:5000").ends_with("not a multiple of 4096; write 4096 or 8192"));
    assert!(message("disk:x").contains("the known ones are mem: and file:"));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,64}") {
        let _ = text.parse::<DeviceUrl>();
    }

    #[test]
    fn what_parses_prints_to_the_same(
        text in r"(mem|file):[/%0-9A-Za-z .+&=\-éß]{0,20}(\?size=[0-9.]{1,8}[KMGT]?(iB)?)?([?&]type=(private|coherent))?(&node=[0-9]{1,4})?"
    ) {
        if let Ok(url) = text.parse::<DeviceUrl>() {
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn any_path_survives(path in "[^\0]{1,40}", pages in 1_u64..1 << 40) {
        let path = format!("/{}", path.trim_start_matches('/'));
        let url = DeviceUrl::File { path: Some(path.into()), size: Some(ByteSize::new(pages * 4096)) };
        prop_assert_eq!(url.to_string().parse(), Ok(url));
    }
}
