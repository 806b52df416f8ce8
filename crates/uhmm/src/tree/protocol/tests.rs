use proptest::prelude::*;

use super::*;
use crate::tree::shared::{ProcessBlock, Totals};

fn welcome() -> Welcome {
    Welcome {
        budget: ByteSize::mib(64),
        force_fallback: true,
        track: false,
        child: true,
        features: Features::WP.union(Features::EVENT_FORK),
        backing: Backing::File,
        device_size: ByteSize::gib(3),
        direct: true,
        block: 77,
    }
}

fn requests() -> Vec<Request> {
    let mut all = vec![
        Request::Hello { pid: 4711, cookie: 0 },
        Request::Hello { pid: u32::MAX, cookie: u64::MAX },
        Request::Child { cookie: 9, features: Features::WP },
        Request::Report,
    ];
    for why in [Farewell::Exit, Farewell::DeviceFull, Farewell::OutOfMemory, Farewell::Failed] {
        all.push(Request::Goodbye(why));
    }
    all
}

fn replies() -> Vec<Reply> {
    let mut all = vec![
        Reply::Welcome(welcome()),
        Reply::Welcome(Welcome { force_fallback: false, track: true, backing: Backing::Memory, ..welcome() }),
    ];
    for why in
        [Refusal::UnknownChild, Refusal::TooMany, Refusal::Version, Refusal::Exhausted, Refusal::Foreign]
    {
        all.push(Reply::Refused(why));
    }
    all
}

#[test]
fn messages_come_back_as_they_were() {
    for request in requests() {
        assert_eq!(Request::decode(request.encode(&mut buffer())), Ok(request));
    }
    for reply in replies() {
        assert_eq!(Reply::decode(reply.encode(&mut buffer())), Ok(reply));
    }
    assert_eq!(welcome().device_pages(), PageCount::new(3 << 18));
    assert_eq!(welcome().block_offset(), 77 * 4096);
}

#[test]
fn bytes_are_little_endian_and_fixed() {
    let mut room = buffer();
    let bytes = Request::Hello { pid: 0x0102, cookie: 3 }.encode(&mut room);
    assert_eq!(&bytes[..8], b"uhmm\x01\x00\x01\x00");
    assert_eq!(&bytes[8..], [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn every_length_but_the_right_one_is_refused() {
    for request in requests() {
        let mut room = buffer();
        let len = request.encode(&mut room).len();
        for wrong in (0..len).chain(len + 1..len + 40) {
            assert!(Request::decode(&room[..wrong]).is_err(), "{request:?} of {wrong} bytes");
        }
    }
    for reply in replies() {
        let mut room = buffer();
        let len = reply.encode(&mut room).len();
        for wrong in (0..len).chain(len + 1..len + 40) {
            assert!(Reply::decode(&room[..wrong]).is_err(), "{reply:?} of {wrong} bytes");
        }
    }
}

#[test]
fn headers_are_checked() {
    let mut room = buffer();
    let bytes = Request::Report.encode(&mut room).to_vec();
    let with = |at: usize, value: u8| {
        let mut changed = bytes.clone();
        changed[at] = value;
        Request::decode(&changed)
    };
    assert_eq!(with(0, b'U'), Err(ProtocolError::Magic(u32::from_le_bytes(*b"Uhmm"))));
    assert_eq!(with(4, 2), Err(ProtocolError::Version(2)));
    assert_eq!(with(6, 99), Err(ProtocolError::Kind(99)));
    // A reply is no request, and the other way round.
    assert_eq!(Reply::decode(&bytes), Err(ProtocolError::Kind(REPORT)));
    let reply = Reply::Refused(Refusal::TooMany).encode(&mut room);
    assert_eq!(Request::decode(reply), Err(ProtocolError::Kind(REFUSED)));
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let mut room = buffer();
    let decode = |bytes: &[u8]| Request::decode(bytes).unwrap_err();
    let value = |field, value| ProtocolError::Value { field, value };
    assert_eq!(decode(encode(HELLO, &[1 << 32, 0], &mut room)), value("pid", 1 << 32));
    assert_eq!(decode(encode(CHILD, &[0, 0], &mut room)), value("cookie", 0));
    assert_eq!(decode(encode(GOODBYE, &[4], &mut room)), value("reason", 4));
    let decode = |bytes: &[u8]| Reply::decode(bytes).unwrap_err();
    assert_eq!(decode(encode(REFUSED, &[9], &mut room)), value("reason", 9));
    assert_eq!(decode(encode(WELCOME, &[0, 16, 0, 0, 0, 0], &mut room)), value("flags", 16));
    assert_eq!(decode(encode(WELCOME, &[0, 0, 0, 2, 0, 0], &mut room)), value("backing", 2));
}

#[test]
fn totals_come_back_as_they_were() {
    let block = ProcessBlock::default();
    block.latency.record(123_456);
    block.note_resident(ByteSize::mib(5));
    let mut totals = Totals::default();
    (totals.processes, totals.device_pages, totals.failed) = (3, 12, 1);
    totals.fold(&block);
    let mut room = buffer();
    let bytes = totals.encode(&mut room);
    assert_eq!(Totals::decode(bytes), Ok(totals));
    assert!(Totals::decode(&bytes[..bytes.len() - 1]).is_err());
    assert!(Reply::decode(bytes).is_err());
}

#[test]
fn the_table_covers_47_bits() {
    assert_eq!(TABLE_PAGES.bytes(), 1 << 47);
    assert_eq!(TABLE_WORD_BYTES, 1 << 38);
    let bits = uhmm_core::pagetable::PageTable::used_words(TABLE_PAGES) as u64 * 8;
    assert_eq!(TABLE_USED_BYTES, bits);
}

proptest! {
    #[test]
    fn random_bytes_are_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_MESSAGE)) {
        let _ = (Request::decode(&bytes), Reply::decode(&bytes), Totals::decode(&bytes));
    }

    #[test]
    fn random_bodies_are_never_a_panic(kind in 0_u16..20, body in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut bytes = b"uhmm\x01\x00".to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(body);
        // What can be read can be written, and means the same.
        let mut room = buffer();
        if let Ok(request) = Request::decode(&bytes) {
            prop_assert_eq!(request.encode(&mut room), &bytes[..]);
        }
        if let Ok(reply) = Reply::decode(&bytes) {
            prop_assert_eq!(reply.encode(&mut room), &bytes[..]);
        }
    }
}
