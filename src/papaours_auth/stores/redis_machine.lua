-- A machine and the epoch of its partition: one snapshot, and nothing written.
-- KEYS: machines and changes of its partition. ARGV: its id, the question's word.
local tip = redis.call('LINDEX', KEYS[2], -1)
return {ARGV[2], tip and string.match(tip, '^%d+ %x+'), redis.call('HGET', KEYS[1], ARGV[1])}
