//! Messages between processes and their keeper.

use uhmm::tree::protocol::{self, Farewell, Refusal, Reply, Request, Welcome};
use uhmm::tree::shared::Totals;
use uhmm_addr::ByteSize;
use uhmm_devices::Backing;
use uhmm_sys::uffd::Features;

/// No bytes make a decoder panic, and what decodes encodes to the same bytes: there is one form of a message.
pub fn run(data: &[u8]) {
    let mut buffer = protocol::buffer();
    if let Ok(request) = Request::decode(data) {
        assert_eq!(request.encode(&mut buffer), data, "{request:?}");
    }
    if let Ok(reply) = Reply::decode(data) {
        assert_eq!(reply.encode(&mut buffer), data, "{reply:?}");
    }
    if let Ok(totals) = Totals::decode(data) {
        assert_eq!(totals.encode(&mut buffer), data, "{totals:?}");
    }
}

/// A message of every kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut buffer = protocol::buffer();
    let features = Features::SIGBUS.union(Features::MOVE);
    let requests = [
        Request::Hello { pid: 4711, cookie: 0 },
        Request::Child { cookie: 1 << 40, features },
        Request::Goodbye(Farewell::DeviceFull),
        Request::Report,
    ];
    let replies = [
        Reply::Refused(Refusal::UnknownChild),
        Reply::Welcome(Welcome {
            budget: ByteSize::mib(64),
            force_fallback: false,
            track: true,
            child: true,
            features,
            backing: Backing::File,
            device_size: ByteSize::gib(1),
            direct: true,
            block: 3,
        }),
    ];
    let mut seeds: Vec<Vec<u8>> =
        requests.iter().map(|request| request.encode(&mut buffer).to_vec()).collect();
    seeds.extend(replies.iter().map(|reply| reply.encode(&mut buffer).to_vec()));
    seeds.push(Totals::default().encode(&mut buffer).to_vec());
    seeds
}
