-- Runs whose due instant lies ahead or has come unnoticed. When a long queue is looked at, they are moved into the index of turns;
-- without this index that look read every run that was due already.
create index ready_timed on ready (queue, due_at) where timed;
