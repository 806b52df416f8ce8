//! Page words and the walk over the table.

use std::vec;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, PageCount, Pfn, VaRange, Vpn};

use super::{Discard, Kind, Leave, PageTable, PageWord, State};
use crate::frame::Slot;

const FIRST: usize = 3 * CHUNK_PAGES;

fn table(chunks: usize) -> PageTable {
    PageTable::owned(Vpn::new(FIRST), PageCount::new(chunks * CHUNK_PAGES))
}

fn pages(first: usize, pages: usize) -> VaRange {
    VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
}

fn used(table: &PageTable, range: VaRange) -> Vec<VaRange> {
    table.used(range).collect()
}

#[test]
fn words_say_what_they_were_made_of() {
    let (pfn, slot) = (Pfn::new((1 << Pfn::BITS) - 1), Slot::new(u32::MAX));
    let rows = [
        (PageWord::EMPTY, State::Empty, None, None, None),
        (PageWord::RESIDENT, State::Resident, None, None, None),
        (PageWord::POISONED, State::Poisoned, None, None, None),
        (PageWord::device(pfn), State::Device, None, Some(pfn), None),
        (PageWord::tracked(pfn), State::Resident, None, Some(pfn), None),
        (PageWord::staged(slot), State::Staged, None, None, Some(slot)),
        (PageWord::exclusive(slot), State::Exclusive, None, None, Some(slot)),
        (PageWord::moving_in(pfn), State::Moving, Some(Kind::In), Some(pfn), None),
        (PageWord::moving_back(slot), State::Moving, Some(Kind::Back), None, Some(slot)),
        (PageWord::moving_out(slot), State::Moving, Some(Kind::Out), None, Some(slot)),
    ];
    for (word, state, kind, pfn, slot) in rows {
        let flagged = word.with_waited().hotter().with_discarded().with_pinned(true).with_writing(true);
        for word in [word, flagged, PageWord::from_raw(word.raw())] {
            assert_eq!((word.state(), word.kind(), word.pfn(), word.slot()), (state, kind, pfn, slot));
        }
        assert!(flagged.is_waited() && flagged.reuse() == word.hotter().reuse() && flagged.is_discarded());
        assert!(flagged.is_pinned() && flagged.is_writing());
        assert!(!flagged.may_leave(), "{flagged:?}");
        assert_eq!(word.may_leave(), matches!(state, State::Empty | State::Resident));
    }
    assert_eq!(PageWord::tracked(pfn).without_copy(), PageWord::RESIDENT);
    assert_eq!(PageWord::from_raw(0xf).state(), State::Poisoned, "what nobody writes is lost");
}

#[test]
fn a_page_is_expected_back_as_soon_as_it_came_before() {
    let pfn = Pfn::new((1 << Pfn::BITS) - 1);
    let left = PageWord::device(pfn).aged(250);
    let back = |now| PageWord::moving_in(pfn).claimed_from(left).refaulted(now);
    // The clock goes round in between.
    for (now, units) in [(250, 4), (251, 11), (9, 128), (249, 512)] {
        assert_eq!((back(now).distance(now), back(now).pfn()), (units, Some(pfn)), "{now}");
    }
    let hot = PageWord::device(pfn).reused_like(back(250)).aged(7);
    assert_eq!(
        (hot.distance(7), hot.distance(8), hot.distance(40)),
        (4, 12, 268),
        "it stayed away for longer"
    );
    assert!(back(9).hotter().distance(9) < back(9).distance(9));
    assert_eq!(hot.without_past(), PageWord::device(pfn));
    assert_eq!(PageWord::device(pfn).with_past_of(hot), hot);
}

#[test]
fn a_claim_remembers_what_the_page_was() {
    let was = PageWord::tracked(Pfn::new(1)).with_pinned(true).hotter();
    let claim = PageWord::moving_in(Pfn::new(1)).claimed_from(was);
    assert!(claim.is_pinned() && claim.is_tracked() && claim.reuse() == was.reuse());
    assert_eq!((claim.kind(), claim.pfn()), (Some(Kind::In), Some(Pfn::new(1))));
}

#[test]
fn transitions_of_a_settled_word() {
    let table = table(1);
    let entry = table.entry(Vpn::new(FIRST));
    assert_eq!(entry.wait(), Err(PageWord::EMPTY));
    assert!(entry.annotate(|word| word.with_pinned(true)));
    let word = entry.load();
    assert_eq!(entry.exchange(PageWord::EMPTY, PageWord::RESIDENT), Err(word));
    assert_eq!(entry.exchange(word, PageWord::device(Pfn::new(9)).with_pinned(true)), Ok(()));
    assert_eq!(entry.discard(true), Discard::Took(PageWord::device(Pfn::new(9)).with_pinned(true)));
    assert!(entry.load().is_discarded() && entry.load().is_pinned() && !entry.load().may_leave());
    assert!(matches!(entry.discard(false), Discard::Took(_)));
    assert_eq!(entry.load(), PageWord::EMPTY, "an unmapped page remembers nothing");
}

#[test]
fn transitions_of_a_claim() {
    let table = table(1);
    let entry = table.entry(Vpn::new(FIRST));
    let claim = PageWord::moving_in(Pfn::new(4));
    entry.store(claim);
    assert!(!entry.annotate(|word| word.with_pinned(true)));
    assert_eq!(entry.leave(PageWord::RESIDENT), Leave { wake: false, discarded: false });
    entry.store(claim);
    assert_eq!(entry.wait(), Ok(()));
    assert_eq!(entry.wait(), Ok(()), "two may wait");
    assert_eq!(entry.discard(true), Discard::Flagged);
    assert_eq!(entry.load().pfn(), Some(Pfn::new(4)), "the claimant still finds what it owns");
    assert_eq!(entry.leave(PageWord::RESIDENT), Leave { wake: true, discarded: true });
    assert_eq!(entry.load(), PageWord::EMPTY);
}

#[test]
fn pages_outside_have_no_word() {
    let table = table(2);
    assert!(table.get(Vpn::new(FIRST - 1)).is_none());
    assert!(table.get(Vpn::new(FIRST + 2 * CHUNK_PAGES)).is_none());
    assert!(table.get(Vpn::new(FIRST + 2 * CHUNK_PAGES - 1)).is_some());
    assert!(table.covers(pages(FIRST, 2 * CHUNK_PAGES)));
    assert!(!table.covers(pages(FIRST, 2 * CHUNK_PAGES + 1)));
    assert!(!table.covers(pages(FIRST - 1, 2)));
}

#[test]
#[should_panic(expected = "outside of the page table")]
fn the_word_of_a_page_outside_panics() {
    let _ = table(1).entry(Vpn::new(0));
}

#[test]
fn a_walk_goes_where_words_were_looked_up() {
    // Three words of bits, of which the last is used in part.
    let chunks = 130;
    let table = table(chunks);
    let all = pages(FIRST, chunks * CHUNK_PAGES);
    assert_eq!(used(&table, all), vec![]);
    let touched = [0, 1, 63, 64, 127, 129];
    for chunk in touched {
        let _ = table.entry(Vpn::new(FIRST + chunk * CHUNK_PAGES + 5));
    }
    let chunk = |n: usize| pages(FIRST + n * CHUNK_PAGES, CHUNK_PAGES);
    assert_eq!(used(&table, all), touched.map(chunk));
    assert_eq!(used(&table, pages(0, usize::MAX >> 20)), touched.map(chunk), "wider than the table");
    // Borders inside of chunks, used and unused ones.
    let inside = pages(FIRST + CHUNK_PAGES + 7, 10);
    assert_eq!(used(&table, inside), vec![inside]);
    assert_eq!(used(&table, pages(FIRST + 2 * CHUNK_PAGES + 7, 10)), vec![]);
    let across = pages(FIRST + 62 * CHUNK_PAGES + 500, CHUNK_PAGES + 12 + 3);
    assert_eq!(used(&table, across), vec![chunk(63), pages(FIRST + 64 * CHUNK_PAGES, 3)]);
    let last = pages(FIRST + 128 * CHUNK_PAGES + 1, 2 * CHUNK_PAGES - 2);
    assert_eq!(used(&table, last), vec![pages(FIRST + 129 * CHUNK_PAGES, CHUNK_PAGES - 1)]);
    assert_eq!(used(&table, pages(0, 10)), vec![], "beside the table");
}

#[test]
fn a_table_over_foreign_memory() {
    let count = PageCount::new(CHUNK_PAGES + 1);
    let mut words = vec![0_u64; count.get()];
    let mut bits = vec![0_u64; PageTable::used_words(count)];
    assert_eq!(bits.len(), 1);
    let (words_at, bits_at) = (
        core::ptr::NonNull::new(words.as_mut_ptr()).unwrap(),
        core::ptr::NonNull::new(bits.as_mut_ptr()).unwrap(),
    );
    // SAFETY: both vectors are long enough, outlive the table, and are used through it only until then.
    let table = unsafe { PageTable::over(words_at, bits_at, Vpn::new(FIRST), count) };
    table.entry(Vpn::new(FIRST + CHUNK_PAGES)).store(PageWord::RESIDENT);
    let last = pages(FIRST + CHUNK_PAGES, 1);
    assert_eq!(used(&table, pages(FIRST, count.get())), vec![last]);
    drop(table);
    assert_eq!((words[CHUNK_PAGES], bits[0]), (PageWord::RESIDENT.raw(), 2));
}

#[test]
fn the_first_page_away_is_found_wherever_it_is() {
    let table = table(2);
    let range = pages(FIRST + 87, 300);
    for page in range.iter().step_by(3) {
        table.entry(page).store(PageWord::RESIDENT.with_pinned(true).hotter());
    }
    assert_eq!(table.first_away(range), None);
    for away in [0, 1, 7, 8, 9, 150, 299] {
        let page = range.first().forward(PageCount::new(away));
        for word in [PageWord::POISONED, PageWord::EMPTY.with_discarded(), PageWord::filling()] {
            table.entry(page).store(word);
            assert_eq!(table.first_away(range), Some((page, word)));
            let behind = range.skip(PageCount::new(away + 1));
            assert_eq!(behind.and_then(|behind| table.first_away(behind)), None);
            table.entry(page).store(PageWord::EMPTY);
        }
    }
}

#[test]
fn words_of_a_range_are_those_of_its_pages() {
    let table = table(2);
    table.entry(Vpn::new(FIRST + 88)).store(PageWord::RESIDENT);
    table.entry(Vpn::new(FIRST + 90)).store(PageWord::POISONED);
    let range = pages(FIRST + 87, 5);
    let expected: Vec<PageWord> = range.iter().map(|page| table.entry(page).load()).collect();
    assert_eq!(table.words(range).collect::<Vec<_>>(), expected);
    assert_eq!(expected[1..4], [PageWord::RESIDENT, PageWord::EMPTY, PageWord::POISONED]);
}

#[test]
fn chunks_are_known_to_have_all_their_pages() {
    let table = table(3);
    let all = pages(FIRST, 3 * CHUNK_PAGES);
    let away = || table.away(all).map(|part| part.first().chunk()).collect::<Vec<_>>();
    let [first, second] = [1, CHUNK_PAGES + 7].map(|n| table.entry(Vpn::new(FIRST + n)));
    assert_eq!(first.exchange(PageWord::EMPTY, PageWord::RESIDENT), Ok(()));
    assert!(away().is_empty(), "in use, and at home");
    assert_eq!(first.exchange(PageWord::RESIDENT, PageWord::moving_out(Slot::new(1))), Ok(()));
    assert!(first.exchange(PageWord::RESIDENT, PageWord::POISONED).is_err(), "somebody was faster");
    assert_eq!(second.discard(true), Discard::Took(PageWord::EMPTY));
    assert_eq!(away(), [3, 4], "one that moves, and one that was given up");
    let _ = first.leave(PageWord::staged(Slot::new(1)));
    assert!(second.annotate(PageWord::without_discarded));
    assert_eq!(away(), [3]);
    first.store(PageWord::INSTALLED);
    assert!(away().is_empty());
    second.store(PageWord::device(Pfn::new(3)));
    assert_eq!(away(), [4]);
}

#[test]
fn what_we_installed_is_known_until_something_happens_to_it() {
    let table = table(3);
    let range = pages(FIRST + 500, 2 * CHUNK_PAGES);
    let installed = |first| table.installed(pages(first, FIRST + 500 + 2 * CHUNK_PAGES - first)).get();
    assert_eq!((installed(FIRST + 500), table.not_installed(range)), (0, range.pages()));
    for page in range.iter() {
        let entry = table.entry(page);
        entry.store(PageWord::moving_in(Pfn::new(1)));
        let _ = entry.leave(PageWord::INSTALLED);
    }
    assert_eq!(installed(FIRST + 500), 2 * CHUNK_PAGES);
    let at = |n: usize| table.entry(Vpn::new(FIRST + n));
    assert!(at(600).annotate(|word| word.with_pinned(true)));
    assert_eq!(installed(FIRST + 500), 2 * CHUNK_PAGES, "a pin changes nothing");
    let doubted = [
        (601, at(601).exchange(PageWord::INSTALLED, PageWord::tracked(Pfn::new(1))).is_ok()),
        (630, at(630).annotate(PageWord::with_discarded)),
        (700, at(700).discard(false) == Discard::Took(PageWord::INSTALLED)),
    ];
    for (n, (page, done)) in doubted.into_iter().enumerate() {
        let from = if n == 0 { FIRST + 500 } else { FIRST + doubted[n - 1].0 + 1 };
        assert!(done);
        assert_eq!(installed(from), FIRST + page - from, "page {page}");
    }
    // To the end of the chunk, and the next one, whose first page is in doubt as well.
    let rest = pages(FIRST + 601, 2 * CHUNK_PAGES - 101);
    assert_eq!(table.not_installed(rest).get(), CHUNK_PAGES - 601 % CHUNK_PAGES);
    let _ = at(2 * CHUNK_PAGES).discard(false);
    assert_eq!(table.not_installed(rest), rest.pages());
    // A claim that is given up may have left the page otherwise than it was.
    for (claim, stays) in [
        (PageWord::moving_out(Slot::new(1)), false),
        (PageWord::filling(), false),
        (PageWord::moving_back(Slot::new(1)), true),
    ] {
        at(510).store(claim);
        let _ = at(510).leave(PageWord::INSTALLED);
        assert_eq!(at(510).load().is_installed(), stays, "{claim:?}");
    }
}
