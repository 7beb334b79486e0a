-- A commit of many transitions updates whole pages of runs. At a fillfactor of 70 such a page has room for 12 of the 28 new
-- versions; each of the rest went to another page and through all five indexes (18 % of the updates, 100 bytes of WAL a
-- transition, measured). At 45 every run's new version stays beside the old one.
-- For pages that are written from now on; a full rewrite is not worth its lock.
alter table runs set (fillfactor = 45);
