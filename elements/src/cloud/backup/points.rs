//! The points in time that a backup has, and which of them stay.

use super::super::format::Point;
use super::super::key;
use super::super::store::Bucket;
use crate::calendar::{Month, day_of};
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use std::collections::BTreeSet;

/// Which points stay: each that one of these names, and always the newest. Where none says anything, all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keep {
    /// So many of the newest.
    pub last: Option<u32>,
    /// The newest one of each of so many days of UTC that have any.
    pub daily: Option<u32>,
    /// The same of weeks, which begin on Monday.
    pub weekly: Option<u32>,
    /// The same of months.
    pub monthly: Option<u32>,
}

impl Keep {
    /// The numbers of those that stay, of points with the newest first.
    pub(crate) fn of(&self, points: &[Point]) -> BTreeSet<u64> {
        if [self.last, self.daily, self.weekly, self.monthly].iter().all(Option::is_none) {
            return points.iter().map(|point| point.number).collect();
        }
        let day = |point: &Point| day_of(point.time);
        let newest = points.iter().take(1).map(|point| point.number);
        newest
            .chain(firsts(points, self.last, |point| point.number))
            .chain(firsts(points, self.daily, day))
            // The first day of 1970 was a Thursday.
            .chain(firsts(points, self.weekly, |point| (day(point) + 3) / 7))
            .chain(firsts(points, self.monthly, |point| Month::of(day(point))))
            .collect()
    }
}

/// The first of each of so many spans of time.
fn firsts<S: Ord>(points: &[Point], count: Option<u32>, span: impl Fn(&Point) -> S) -> Vec<u64> {
    let (mut spans, mut firsts) = (BTreeSet::new(), Vec::new());
    for point in points {
        if spans.len() < count.unwrap_or(0) as usize && spans.insert(span(point)) {
            firsts.push(point.number);
        }
    }
    firsts
}

/// All points of a backup, the newest first.
///
/// # Errors
/// One of them is damaged.
pub(crate) async fn points(backup: &Bucket) -> Result<Vec<Point>> {
    let (mut points, mut pages) = (Vec::new(), backup.pages(key::POINTS));
    while let Some(listed) = pages.next().await? {
        for number in listed.iter().filter_map(|listed| key::pointed(&listed.key)) {
            points.extend(read(backup, number).await?);
        }
    }
    Ok(points)
}

/// The newest point, if there is any.
pub(crate) async fn newest(backup: &Bucket) -> Result<Option<Point>> {
    loop {
        let listed = backup.list(key::POINTS, "", 1).await?;
        let Some(number) = listed.first().and_then(|listed| key::pointed(&listed.key)) else {
            return Ok(None);
        };
        // One that has gone since is not the newest.
        if let Some(point) = read(backup, number).await? {
            return Ok(Some(point));
        }
    }
}

/// That point; the newest where none is named.
///
/// # Errors
/// There is none.
pub(super) async fn find(backup: &Bucket, number: Option<u64>) -> Result<Point> {
    let (found, missing) = match number {
        Some(number) => (
            read(backup, number).await?,
            format!("the backup has no point {number}: `mason bucket points` names those that it has"),
        ),
        None => (newest(backup).await?, "the backup was never completed".to_owned()),
    };
    found.ok_or_else(|| Error::new(Kind::Unavailable, missing))
}

async fn read(backup: &Bucket, number: u64) -> Result<Option<Point>> {
    let key = key::point(number);
    let Some(bytes) = backup.get_whole(&key, 1 << 16).await? else { return Ok(None) };
    Point::decode(&bytes.to_vec(), number).map(Some).map_err(|error| error.with_path(&key))
}

/// # Errors
/// Another run has had that number.
pub(super) async fn put(backup: &Bucket, point: &Point) -> Result<()> {
    match backup.put_if_absent(&key::point(point.number), Data::copy_of(&point.encode())).await? {
        true => Ok(()),
        false => Err(Error::new(Kind::Busy, "somebody else has made that point of the backup")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calendar::DAY;

    /// One in six hours, from the day `days` on, which is a Thursday.
    fn points(days: u64) -> Vec<Point> {
        let one =
            |number: u64| Point { number, time: number * DAY / 4, size: 1, epoch: 1, n: number, commit: 0 };
        (1..=days * 4).rev().map(one).collect()
    }

    fn kept(keep: Keep, points: &[Point]) -> Vec<u64> {
        keep.of(points).into_iter().rev().collect()
    }

    #[test]
    fn each_rule_keeps_the_newest_of_its_spans() {
        let points = points(100);
        assert_eq!(kept(Keep::default(), &points).len(), 400);
        assert_eq!(kept(Keep { last: Some(3), ..Keep::default() }, &points), [400, 399, 398]);
        assert_eq!(kept(Keep { daily: Some(3), ..Keep::default() }, &points), [400, 399, 395]);
        // 400 is of day 100, 11 April 1970, a Saturday; the Sunday before was day 94, whose last is 379.
        assert_eq!(kept(Keep { weekly: Some(2), ..Keep::default() }, &points), [400, 379]);
        // The last day of March was number 89, whose last is 359; of February 58, of January 30.
        assert_eq!(kept(Keep { monthly: Some(4), ..Keep::default() }, &points), [400, 359, 235, 123]);
        let both = Keep { last: Some(2), daily: Some(2), ..Keep::default() };
        assert_eq!(kept(both, &points), [400, 399]);
        // More than there are.
        assert_eq!(kept(Keep { monthly: Some(400), ..Keep::default() }, &points).len(), 4);
    }

    #[test]
    fn the_newest_stays_in_any_case() {
        let points = points(2);
        assert_eq!(kept(Keep { last: Some(0), ..Keep::default() }, &points), [8]);
        assert_eq!(kept(Keep { weekly: Some(0), ..Keep::default() }, &points), [8]);
        assert!(Keep::default().of(&[]).is_empty());
    }
}
