//! Lists of borrows that live for one step, without an allocation for each.

/// An empty list in the memory of another whose elements have the same layout, such as the same
/// type with another lifetime.
pub(crate) fn recycle<A, B>(mut list: Vec<A>) -> Vec<B> {
    const {
        assert!(size_of::<A>() == size_of::<B>() && align_of::<A>() == align_of::<B>());
    }
    list.clear();
    // The standard library collects in place; `tests/allocations.rs` would notice if it did not.
    list.into_iter().filter_map(|_| None).collect()
}
