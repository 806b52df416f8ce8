/* A table in memory, an index of it, and a check of both. */
PRAGMA cache_size = -1;
CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, v TEXT);
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500000)
INSERT INTO t SELECT i, i * 7919 % 1000003, printf('%032d-%d', i * 31337 % 99991, i) FROM n;
CREATE INDEX by_k ON t (k);
UPDATE t SET v = v || 'x' WHERE k % 97 = 0;
DELETE FROM t WHERE k % 101 = 0;
SELECT count(*), sum(k), sum(length(v)) FROM t;
SELECT id, v FROM t WHERE k BETWEEN 500000 AND 500040 ORDER BY k;
PRAGMA integrity_check;
